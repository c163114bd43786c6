// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cancellation between Martlet peers, against a server played by hand.

use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::packet::ResponseBody;
use martlet_tcp::wire::{FrameLimits, FrameState};
use martlet_tcp::{Framing, NestFraming, TcpClient, TcpClientOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Peer {
    socket: TcpStream,
    buffer: BytesMut,
    state: FrameState,
}

impl Peer {
    async fn recv(&mut self) -> serde_json::Value {
        loop {
            let limits = FrameLimits::default();
            if let Some(body) = NestFraming.decode(&mut self.buffer, &mut self.state, &limits).unwrap() {
                return serde_json::from_slice(&body).unwrap();
            }
            assert_ne!(self.socket.read_buf(&mut self.buffer).await.unwrap(), 0, "the client closed");
        }
    }

    async fn send(&mut self, id: &str, body: &ResponseBody, status: Option<&str>) {
        let (mut packet, mut frame) = (BytesMut::new(), BytesMut::new());
        let id = serde_json::to_vec(id).unwrap();
        JsonCodec.encode_response(Some(&id), body, status, &mut packet).unwrap();
        NestFraming.encode(&packet, &mut frame).unwrap();
        self.socket.write_all(&frame).await.unwrap();
    }
}

#[actix::test]
async fn a_call_dropped_before_the_server_shows_itself_is_cancelled_then() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpClient::connect_to("127.0.0.1", listener.local_addr().unwrap().port());
    let mut call = client.send::<u64>("endless", 1);
    assert!((&mut call).now_or_never().is_none());
    let (socket, _) = listener.accept().await.unwrap();
    let mut peer = Peer { socket, buffer: BytesMut::new(), state: FrameState::default() };
    let request = peer.recv().await;
    drop(call);
    let silence = tokio::time::timeout(Duration::from_millis(50), peer.recv()).await;
    assert!(silence.is_err(), "a server that may be NestJS was told {silence:?}");
    peer.send("martlet", &ResponseBody::Last(None), Some("martlet")).await;
    let cancel = tokio::time::timeout(Duration::from_secs(5), peer.recv()).await.unwrap();
    assert_eq!(cancel, serde_json::json!({"pattern": "martlet.cancel", "data": request["id"]}));
    client.close().await;
}

#[actix::test]
async fn a_server_that_answers_without_showing_itself_hears_of_no_cancellation() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpClient::connect_to("127.0.0.1", listener.local_addr().unwrap().port());
    let mut calls: Vec<_> = (0..2).map(|_| client.send::<()>("endless", 1)).collect();
    assert!(calls.iter_mut().all(|call| call.now_or_never().is_none()));
    let (socket, _) = listener.accept().await.unwrap();
    let mut peer = Peer { socket, buffer: BytesMut::new(), state: FrameState::default() };
    let first = peer.recv().await;
    peer.recv().await;
    drop(calls.pop());
    tokio::task::yield_now().await;
    peer.send(first["id"].as_str().unwrap(), &ResponseBody::Last(None), None).await;
    calls.pop().unwrap().await.unwrap();
    let silence = tokio::time::timeout(Duration::from_millis(50), peer.recv()).await;
    assert!(silence.is_err(), "{silence:?}");
    client.close().await;
}

#[actix::test]
async fn a_client_told_so_does_not_look_for_martlet_servers() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for cancellation in [false, true] {
        let options = TcpClientOptions::new().address("127.0.0.1", port);
        let client = TcpClient::new(options.with(|options| options.cancellation = cancellation));
        let mut call = client.send::<()>("endless", 1).no_timeout();
        assert!((&mut call).now_or_never().is_none());
        let (socket, _) = listener.accept().await.unwrap();
        let mut peer = Peer { socket, buffer: BytesMut::new(), state: FrameState::default() };
        let request = peer.recv().await;
        assert_eq!(request["metadata"]["martlet-peer"].is_string(), cancellation, "{request}");
        drop(call);
        client.close().await;
    }
}
