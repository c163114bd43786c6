// SPDX-License-Identifier: MIT OR Apache-2.0
use futures::Stream;
use martlet::{Data, RpcError, event, message};

struct Opaque;

fn argument(_numbers: Vec<i64>) -> Result<u8, RpcError> {
    Ok(1)
}

fn value(Data(number): Data<u8>) -> u8 {
    number
}

fn items() -> impl Stream<Item = Opaque> {
    futures::stream::iter([Opaque])
}

fn error() -> Result<u8, Opaque> {
    Ok(1)
}

fn main() {
    message("argument", argument);
    message("value", value);
    message("items", items);
    event("error", error);
}
