// SPDX-License-Identifier: MIT OR Apache-2.0
//! A codec and a framing from elsewhere, with nothing but what their traits demand: the defaults do the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::StreamExt;
use martlet_core::codec::{Codec, CodecError, Frame, JsonCodec};
use martlet_core::packet::{IncomingPacket, OutgoingPacket, ResponseBody, ResponsePacket};
use martlet_core::{
    CallError, Data, Format, Microservice, RpcError, RunningService, ServiceEvent, Streaming, event, message,
};
use martlet_tcp::wire::{FrameError, FrameLimits, FrameMark, FrameState, Framing};
use martlet_tcp::{LengthDelimited, NestFraming, TcpClient, TcpClientOptions, TcpServer, TcpServerOptions};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::support::within;

/// JSON behind a mark, as it is or with every bit the other way round. What a codec may know better is left to the
/// defaults of [`Codec`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marked {
    pub(crate) inverted: bool,
}

const MARK: u8 = b'~';
/// A text that it refuses, when it has written a part of the packet.
const REFUSED: &str = "not by this codec";

impl Marked {
    fn turn(self, byte: u8) -> u8 {
        if self.inverted { !byte } else { byte }
    }

    fn seal(
        self,
        out: &mut BytesMut,
        write: impl FnOnce(&mut BytesMut) -> Result<(), CodecError>,
    ) -> Result<(), CodecError> {
        let mut json = BytesMut::new();
        write(&mut json)?;
        out.put_u8(MARK);
        out.extend(json.iter().map(|byte| self.turn(*byte)));
        match json.windows(REFUSED.len()).any(|text| text == REFUSED.as_bytes()) {
            true => Err(CodecError::Other(REFUSED.into())),
            false => Ok(()),
        }
    }

    fn unseal(self, frame: &[u8]) -> Result<Frame<'static>, CodecError> {
        match frame {
            [MARK, sealed @ ..] => {
                Ok(Frame::from(sealed.iter().map(|byte| self.turn(*byte)).collect::<Bytes>()))
            }
            _ => Err(CodecError::Other("it does not begin with a mark".into())),
        }
    }
}

impl Codec for Marked {
    fn name(&self) -> &'static str {
        "marked"
    }

    fn format(&self) -> Format {
        Format::Json
    }

    fn is_text(&self) -> bool {
        !self.inverted
    }

    fn read_request(&self, frame: Frame<'_>, packet: &mut IncomingPacket) -> Result<(), CodecError> {
        JsonCodec.read_request(self.unseal(&frame)?, packet)
    }

    fn encode_request(&self, packet: &OutgoingPacket<'_>, out: &mut BytesMut) -> Result<(), CodecError> {
        self.seal(out, |json| JsonCodec.encode_request(packet, json))
    }

    fn decode_response(&self, frame: Frame<'_>) -> Result<ResponsePacket, CodecError> {
        JsonCodec.decode_response(self.unseal(&frame)?)
    }

    fn encode_response(
        &self,
        id: Option<&[u8]>,
        body: &ResponseBody,
        status: Option<&str>,
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        self.seal(out, |json| JsonCodec.encode_response(id, body, status, json))
    }
}

/// Four bytes of length, the bytes, and a closing byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Closed;

const CLOSING: u8 = b';';

impl Framing for Closed {
    fn name(&self) -> &'static str {
        "closed"
    }

    fn binary_safe(&self) -> bool {
        true
    }

    fn decode(
        &self,
        buf: &mut BytesMut,
        _: &mut FrameState,
        limits: &FrameLimits,
    ) -> Result<Option<Bytes>, FrameError> {
        let Some(head) = buf.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*head) as usize;
        let whole = length.saturating_add(5);
        if whole > limits.max_frame {
            return Err(FrameError::TooLong { length: whole, limit: limits.max_frame });
        }
        if buf.len() < whole {
            return Ok(None);
        }
        buf.advance(4);
        let body = buf.split_to(length).freeze();
        match buf.get_u8() {
            CLOSING => Ok(Some(body)),
            other => Err(FrameError::Other { reason: format!("it closes with {other}") }),
        }
    }

    fn begin(&self, out: &mut BytesMut, hint: usize) -> FrameMark {
        LengthDelimited.begin(out, hint)
    }

    fn finish(&self, out: &mut BytesMut, mark: FrameMark) -> Result<(), FrameError> {
        LengthDelimited.finish(out, mark)?;
        out.put_u8(CLOSING);
        Ok(())
    }
}

/// What is on the wire for a JSON text when both are foreign.
fn sealed(json: &str) -> Vec<u8> {
    let length = u32::try_from(json.len() + 1).unwrap();
    let inverted: Vec<u8> = json.bytes().map(|byte| !byte).collect();
    [&length.to_be_bytes()[..], b"~", &inverted, b";"].concat()
}

/// The JSON text of the next such frame.
async fn unsealed(socket: &mut TcpStream) -> String {
    let read = async {
        let length = socket.read_u32().await.unwrap() as usize;
        let mut frame = vec![0; length + 1];
        socket.read_exact(&mut frame).await.unwrap();
        assert_eq!((frame[0], frame[length]), (b'~', b';'));
        String::from_utf8(frame[1..length].iter().map(|byte| !byte).collect()).unwrap()
    };
    within(read).await.expect("a frame")
}

/// A service that was asked for on a free port, and what it hears of events and reports.
struct Service {
    running: RunningService,
    heard: mpsc::Receiver<u64>,
    reported: mpsc::Receiver<String>,
}

impl Service {
    async fn start(codec: impl Codec, framing: impl Framing) -> Self {
        let (hears, heard) = mpsc::channel(1024);
        let (reports, reported) = mpsc::channel(1024);
        let options = TcpServerOptions::new().address("127.0.0.1", 0).codec(codec).framing(framing);
        let running = Microservice::new()
            .arbiters(1)
            .on(move |event: &ServiceEvent| reports.try_send(format!("{}: {event}", event.name())).unwrap())
            .handlers(message("echo", |Data(text): Data<String>| async move { Ok::<_, RpcError>(text) }))
            .handlers(message("count", |Data(to): Data<u64>| async move {
                Ok::<_, RpcError>(Streaming(futures::stream::iter(0..to)))
            }))
            .handlers(message("refused", || async { Ok::<_, RpcError>(REFUSED) }))
            .handlers(message("fail", || async { Err::<(), _>(RpcError::message("no")) }))
            .handlers(event("noted", move |Data(number): Data<u64>| {
                hears.try_send(number).unwrap();
                async { Ok::<_, RpcError>(()) }
            }))
            .server(TcpServer::new(options))
            .start()
            .await
            .unwrap();
        Self { running, heard, reported }
    }

    fn port(&self) -> u16 {
        self.running.url().rsplit(':').next().unwrap().parse().unwrap()
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port())).await.unwrap()
    }
}

/// Calls, a stream, an event and errors, with the same on both sides.
async fn everything_crosses(codec: impl Codec + Copy, framing: impl Framing + Copy) {
    let mut service = Service::start(codec, framing).await;
    let options = TcpClientOptions::new().address("127.0.0.1", service.port());
    let client = TcpClient::new(options.codec(codec).framing(framing));
    for text in ["", "short", "größer 😀", &"long".repeat(50_000)] {
        assert_eq!(client.send::<String>("echo", text).await.unwrap(), text);
    }
    // Many in one segment, so that replies come together.
    let calls = (0..200).map(|number| client.send::<String>("echo", number.to_string()));
    let replies = futures::future::try_join_all(calls).await.unwrap();
    assert!(replies.iter().eq(&(0..200).map(|number| number.to_string()).collect::<Vec<_>>()));
    let items: Vec<_> = client.send::<u64>("count", 5).stream().map(Result::unwrap).collect().await;
    assert_eq!(items, [0, 1, 2, 3, 4]);
    client.emit("noted", 7).await.unwrap();
    assert_eq!(within(service.heard.recv()).await, Some(Some(7)));
    match client.send::<()>("fail", ()).await {
        Err(CallError::Remote(error)) => assert_eq!(error.message().as_deref(), Some("no")),
        other => panic!("a remote error expected, got {other:?}"),
    }
    let unknown = client.send::<()>("unknown", ()).await;
    assert!(matches!(unknown, Err(CallError::NoHandler { .. })), "{unknown:?}");
    assert_eq!((client.pending(), client.late_replies()), (0, 0));
    client.close().await;
    assert!(service.running.stop(Duration::from_secs(5)).await.clean);
    while let Ok(told) = service.reported.try_recv() {
        assert!(told.starts_with("no_message_handler"), "{told}");
    }
}

#[actix::test]
async fn calls_streams_events_and_errors_cross_a_foreign_codec_in_a_foreign_framing() {
    everything_crosses(Marked { inverted: true }, Closed).await;
}

#[actix::test]
async fn a_foreign_text_codec_goes_with_nests_framing_and_nests_codec_with_a_foreign_framing() {
    everything_crosses(Marked { inverted: false }, NestFraming).await;
    everything_crosses(JsonCodec, Closed).await;
}

#[actix::test]
async fn what_a_foreign_codec_refuses_leaves_nothing_on_the_wire() {
    let mut service = Service::start(Marked { inverted: true }, Closed).await;
    let options = TcpClientOptions::new().address("127.0.0.1", service.port());
    let client = TcpClient::new(options.codec(Marked { inverted: true }).framing(Closed));
    let echo = |text: &'static str| client.send::<String>("echo", text);
    let (before, ours, theirs, after) =
        futures::join!(echo("a"), echo(REFUSED), client.send::<String>("refused", ()), echo("b"));
    assert_eq!((before.unwrap(), after.unwrap()), ("a".to_owned(), "b".to_owned()));
    assert!(matches!(ours, Err(CallError::Encode { .. })), "{ours:?}");
    match theirs {
        Err(CallError::Remote(error)) => {
            assert_eq!(error.message().as_deref(), Some("Internal server error"));
        }
        other => panic!("a remote error expected, got {other:?}"),
    }
    let told = within(service.reported.recv()).await.unwrap().unwrap();
    assert!(told.starts_with("bad_input"), "{told}");
    assert_eq!(echo("c").await.unwrap(), "c");
    client.close().await;
    service.running.stop(Duration::from_secs(5)).await;
}

#[actix::test]
async fn a_server_reads_and_writes_what_they_say_and_nothing_else() {
    let mut service = Service::start(Marked { inverted: true }, Closed).await;
    let mut socket = service.connect().await;
    // In pieces as small as they can be, then two at once.
    for byte in sealed(r#"{"pattern":"echo","data":"a","id":"1"}"#) {
        socket.write_all(&[byte]).await.unwrap();
        socket.flush().await.unwrap();
    }
    assert_eq!(unsealed(&mut socket).await, r#"{"response":"a","isDisposed":true,"id":"1"}"#);
    let two =
        ["b", "c"].map(|text| sealed(&json!({"pattern": "echo", "data": text, "id": text}).to_string()));
    socket.write_all(&two.concat()).await.unwrap();
    for text in ["b", "c"] {
        let expected = format!(r#"{{"response":"{text}","isDisposed":true,"id":"{text}"}}"#);
        assert_eq!(unsealed(&mut socket).await, expected);
    }
    // A fault of each is reported in its words and ends the connection.
    let unmarked = [&5_u32.to_be_bytes()[..], b"plain;"].concat();
    let mut unclosed = sealed(r#"{"pattern":"echo","data":"d","id":"4"}"#);
    *unclosed.last_mut().unwrap() = b'?';
    for (bytes, part) in
        [(unmarked, "it does not begin with a mark"), (unclosed, "malformed frame: it closes with 63")]
    {
        let mut socket = service.connect().await;
        socket.write_all(&bytes).await.unwrap();
        assert_eq!(within(socket.read(&mut [0])).await.unwrap().unwrap(), 0);
        let told = within(service.reported.recv()).await.unwrap().unwrap();
        assert!(told.starts_with("bad_input") && told.contains(part), "{told}");
    }
    socket.write_all(&sealed(r#"{"pattern":"echo","data":"e","id":"5"}"#)).await.unwrap();
    assert_eq!(unsealed(&mut socket).await, r#"{"response":"e","isDisposed":true,"id":"5"}"#);
    drop(socket);
    service.running.stop(Duration::from_secs(5)).await;
}

#[actix::test]
async fn a_client_reads_and_writes_what_they_say_with_ids_of_its_own() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = TcpClientOptions::new().address("127.0.0.1", listener.local_addr().unwrap().port());
    let options = options.with(|options| {
        options.cancellation = false;
        options.client.propagate = false;
    });
    let client = TcpClient::new(options.codec(Marked { inverted: true }).framing(Closed));
    let call = client.send::<String>("echo", "a");
    let peer = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let request = unsealed(&mut socket).await;
        let id = request.strip_prefix(r#"{"pattern":"echo","data":"a","id":""#).unwrap();
        let id = id.strip_suffix(r#""}"#).unwrap();
        assert!(id.len() == 21 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        // As it stands here the usual reader of short replies would know it.
        socket
            .write_all(&sealed(&format!(r#"{{"response":"b","isDisposed":true,"id":"{id}"}}"#)))
            .await
            .unwrap();
        socket
    };
    let (reply, mut socket) = futures::join!(call, peer);
    assert_eq!(reply.unwrap(), "b");
    // What is no packet of theirs ends the connection, and the call with it.
    let call = client.send::<String>("echo", "c");
    let peer = async {
        unsealed(&mut socket).await;
        socket.write_all(&[&5_u32.to_be_bytes()[..], b"plain;"].concat()).await.unwrap();
    };
    match futures::join!(call, peer).0 {
        Err(CallError::Lost { cause }) => assert!(cause.to_string().contains("malformed packet"), "{cause}"),
        other => panic!("{other:?}"),
    }
    client.close().await;
}

#[actix::test]
async fn a_foreign_binary_codec_does_not_start_in_a_framing_of_text() {
    let options = TcpServerOptions::new().address("127.0.0.1", 0).codec(Marked { inverted: true });
    let started = Microservice::new().on_current_arbiter().server(TcpServer::new(options)).start().await;
    let told = started.unwrap_err().to_string();
    assert!(told.contains("marked") && told.contains("nest"), "{told}");
}

/// A line of text, which it counts the looks at.
#[derive(Debug, Clone, Default)]
struct Lines {
    looks: Arc<AtomicUsize>,
}

/// The longest line that it writes.
const LONGEST: usize = 65_535;

impl Framing for Lines {
    fn name(&self) -> &'static str {
        "lines"
    }

    fn binary_safe(&self) -> bool {
        false
    }

    fn decode(
        &self,
        buf: &mut BytesMut,
        state: &mut FrameState,
        _: &FrameLimits,
    ) -> Result<Option<Bytes>, FrameError> {
        let unseen = &buf[state.scanned()..];
        let end = unseen.iter().position(|byte| *byte == b'\n');
        self.looks.fetch_add(end.map_or(unseen.len(), |end| end + 1), Ordering::SeqCst);
        let Some(end) = end else {
            state.set_scanned(buf.len());
            return Ok(None);
        };
        let line = buf.split_to(state.scanned() + end).freeze();
        buf.advance(1);
        state.set_scanned(0);
        Ok(Some(line))
    }

    fn begin(&self, out: &mut BytesMut, _: usize) -> FrameMark {
        FrameMark::new(out.len(), out.len())
    }

    fn finish(&self, out: &mut BytesMut, mark: FrameMark) -> Result<(), FrameError> {
        let length = out.len() - mark.body();
        if length > LONGEST {
            out.truncate(mark.start());
            return Err(FrameError::TooLong { length, limit: LONGEST });
        }
        out.put_u8(b'\n');
        Ok(())
    }
}

#[actix::test]
async fn what_a_foreign_framing_has_looked_at_is_not_looked_at_again() {
    let lines = Lines::default();
    let looks = Arc::clone(&lines.looks);
    let service = Service::start(JsonCodec, lines).await;
    let mut socket = service.connect().await;
    socket.set_nodelay(true).unwrap();
    let line = "{\"pattern\":\"echo\",\"data\":\"a\",\"id\":\"1\"}\n";
    for _ in 0..2 {
        for byte in line.bytes() {
            socket.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut reply = vec![0; r#"{"response":"a","isDisposed":true,"id":"1"}"#.len() + 1];
        within(socket.read_exact(&mut reply)).await.expect("a reply").unwrap();
        assert_eq!(reply.last(), Some(&b'\n'));
    }
    assert_eq!(looks.load(Ordering::SeqCst), 2 * line.len());
    drop(socket);
    service.running.stop(Duration::from_secs(5)).await;
}

#[actix::test]
async fn what_a_foreign_framing_cannot_carry_is_refused_alone() {
    let service = Service::start(JsonCodec, Lines::default()).await;
    let options = TcpClientOptions::new().address("127.0.0.1", service.port());
    let client = TcpClient::new(options.codec(JsonCodec).framing(Lines::default()));
    let echo = |text: String| client.send::<String>("echo", text);
    let (before, large, after) =
        futures::join!(echo("a".to_owned()), echo("x".repeat(LONGEST + 1)), echo("b".to_owned()));
    assert_eq!((before.unwrap(), after.unwrap()), ("a".to_owned(), "b".to_owned()));
    assert!(matches!(large, Err(CallError::Encode { .. })), "{large:?}");
    // Nearly as much as it carries, in both directions.
    let around = r#"{"response":"","isDisposed":true,"id":"0123456789abcdef01234"}"#.len();
    let most = "x".repeat(LONGEST - 600 - around);
    assert_eq!(echo(most.clone()).await.unwrap(), most);
    client.close().await;
    service.running.stop(Duration::from_secs(5)).await;
}
