// SPDX-License-Identifier: MIT OR Apache-2.0
use futures::Stream;
use martlet::message;

// The error is a value too: are the items results, or values that are `{"Ok":1}`?
fn either() -> impl Stream<Item = Result<u8, String>> {
    futures::stream::iter([Ok(1)])
}

fn main() {
    message("either", either);
}
