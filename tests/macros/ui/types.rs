// SPDX-License-Identifier: MIT OR Apache-2.0
use futures::Stream;
use martlet::{RpcError, controller, message};

struct Opaque;

struct Shop;

#[controller]
impl Shop {
    #[message_pattern("argument")]
    fn argument(&self, _numbers: Vec<i64>) {}

    #[message_pattern("payload")]
    fn payload(&self, #[payload] _value: Opaque) {}

    #[message_pattern("reply")]
    fn reply(&self) -> Opaque {
        Opaque
    }

    #[message_pattern("items")]
    fn items(&self) -> impl Stream<Item = Opaque> {
        futures::stream::iter([Opaque])
    }

    #[message_pattern("error")]
    fn error(&self) -> Result<u8, Opaque> {
        Ok(1)
    }
}

async fn argument(_numbers: Vec<i64>) -> Result<u8, RpcError> {
    Ok(1)
}

async fn reply() -> Result<Opaque, RpcError> {
    Ok(Opaque)
}

async fn no_result() -> u8 {
    1
}

fn main() {
    message("argument", argument);
    message("reply", reply);
    message("no result", no_result);
}
