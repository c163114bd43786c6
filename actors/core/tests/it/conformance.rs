// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite on the in-memory transporter: between peers and through brokers, in JSON and in
//! MessagePack.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use martlet_core::codec::MessagePackCodec;
use martlet_core::{ClientOptions, ClientProxy, Format, Server, ServerOptions};
use martlet_testkit::conformance::{Harness, RawPeer};
use martlet_testkit::features::Features;
use martlet_testkit::memory::{
    MemoryClient, MemoryNetwork, MemoryOptions, MemoryRawPeer, MemoryServer, Mode,
};

struct Memory {
    options: MemoryOptions,
    networks: Vec<MemoryNetwork>,
}

impl Memory {
    fn with(change: impl FnOnce(&mut MemoryOptions)) -> Self {
        let mut options = MemoryOptions::default();
        change(&mut options);
        Self { options, networks: Vec::new() }
    }

    fn network(&self, url: &str) -> &MemoryNetwork {
        self.networks.iter().find(|network| network.url() == url).expect("a server of this harness")
    }
}

struct Raw(MemoryRawPeer);

impl RawPeer for Raw {
    fn send(&mut self, packet: Bytes) -> LocalBoxFuture<'_, ()> {
        self.0.send(packet);
        std::future::ready(()).boxed_local()
    }

    fn recv(&mut self) -> LocalBoxFuture<'_, Option<Bytes>> {
        self.0.recv().boxed_local()
    }
}

impl Harness for Memory {
    fn features(&self) -> Features {
        let peers = self.options.mode == Mode::Peers;
        let json = self.options.codec.format() == Format::Json;
        let mut features = Features::default();
        features.format = self.options.codec.format();
        features.cancel = true;
        features.cuts = true;
        features.raw = peers && json;
        features.accepts = peers;
        features.subscribes = !peers;
        features.shares = !peers;
        features.wildcards = self.options.wildcards;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        // Peers need a network for each server, a broker serves them all.
        if self.options.mode == Mode::Peers || self.networks.is_empty() {
            self.networks.push(MemoryNetwork::with(self.options.clone()));
        }
        MemoryServer::with(&self.networks[self.networks.len() - 1], options)
    }

    fn client(&mut self, url: &str, options: ClientOptions) -> ClientProxy {
        MemoryClient::with(self.network(url), options)
    }

    fn cut(&mut self) {
        self.networks.iter().for_each(MemoryNetwork::cut);
    }

    fn set_reachable(&mut self, reachable: bool) {
        for network in &self.networks {
            if reachable { network.restore() } else { network.take_down() }
        }
    }

    fn raw(&mut self, url: &str) -> LocalBoxFuture<'static, Box<dyn RawPeer>> {
        let peer = self.network(url).connect_raw().unwrap();
        std::future::ready(Box::new(Raw(peer)) as Box<dyn RawPeer>).boxed_local()
    }
}

mod peers {
    use super::*;
    martlet_testkit::conformance_tests!(Memory::with(|_| {}); core, metadata, cancel, cuts, raw, accepts);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(
        Memory::with(|options| options.codec = Arc::new(MessagePackCodec)); core, metadata, cancel, cuts, accepts
    );
}

mod broker {
    use super::*;
    martlet_testkit::conformance_tests!(
        Memory::with(|options| options.mode = Mode::Broker); core, metadata, cancel, cuts, subscribes, shares
    );
}

mod settling_broker {
    use super::*;
    martlet_testkit::conformance_tests!(
        Memory::with(|options| {
            options.mode = Mode::Broker;
            options.settles = true;
            options.wildcards = true;
        });
        core, metadata, cancel, cuts, subscribes, shares, wildcards
    );
}
