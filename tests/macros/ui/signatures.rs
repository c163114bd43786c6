// SPDX-License-Identifier: MIT OR Apache-2.0
use martlet::controller;

struct Shop;

#[controller]
impl Shop {
    #[message_pattern("exclusive")]
    fn exclusive(&mut self) {}

    #[message_pattern("consumed")]
    fn consumed(self) {}

    #[message_pattern("function")]
    fn function() {}

    #[message_pattern("generic")]
    fn generic<T>(&self, #[payload] value: Vec<T>) {}

    #[message_pattern("borrowed")]
    fn borrowed(&self, #[payload] name: &str, #[payload("list")] list: &[u8]) {}

    #[message_pattern("unnamed")]
    fn unnamed(&self, value: impl Sized) {}

    #[message_pattern("key")]
    fn key(&self, #[payload(key)] value: u8) {}

    fn no_handler(&self, #[payload] value: u8) {}
}

fn main() {
    let _ = martlet::Microservice::new().controller(|| Shop);
}
