// SPDX-License-Identifier: MIT OR Apache-2.0
//! Actors that cannot be supervised, or not be routed.

use actix::prelude::{Actor, Context, Handler, Message};
use martlet::ActorGroup;
use martlet::prelude::*;
use martlet::supervise::{ChildSpec, Strategy, Supervisor};

#[derive(Default)]
struct NotSupervised;

impl Actor for NotSupervised {
    type Context = Context<Self>;
}

#[derive(Default, Supervised)]
struct Till;

impl Actor for Till {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "Result<u64, RpcError>")]
struct NotRead(u64);

impl Handler<NotRead> for Till {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, message: NotRead, _: &mut Context<Self>) -> Self::Result {
        Ok(message.0)
    }
}

#[derive(Message, serde::Deserialize)]
#[rtype(result = "u64")]
struct NotAReply(u64);

impl Handler<NotAReply> for Till {
    type Result = u64;

    fn handle(&mut self, message: NotAReply, _: &mut Context<Self>) -> Self::Result {
        message.0
    }
}

fn main() {
    let _ = ActorGroup::new(NotSupervised::default);
    let _ = ChildSpec::new(NotSupervised::default);
    let _ = Supervisor::new(Strategy::OneForOne).child("a", |_| ChildSpec::new(NotSupervised::default));
    let _ = ActorGroup::new(Till::default).message::<NotRead>("a");
    let _ = ActorGroup::new(Till::default).message::<NotAReply>("a");
}
