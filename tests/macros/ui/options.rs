// SPDX-License-Identifier: MIT OR Apache-2.0
use martlet::controller;

struct Shop;

#[controller]
impl Shop {
    #[message_pattern]
    fn bare(&self) {}

    #[event_pattern()]
    fn empty(&self) {}

    #[message_pattern("a", quue = "workers")]
    fn typo(&self) {}

    #[message_pattern(cmd = "a", transprt = TCP)]
    fn typo_in_the_short_form(&self) {}

    #[message_pattern("a", retries = 3)]
    fn unknown(&self) {}

    #[message_pattern("a", queue = "a", queue = "b")]
    fn twice(&self) {}

    #[message_pattern(["a", "b"])]
    fn array(&self) {}

    #[message_pattern("a", "b")]
    fn two(&self) {}

    #[message_pattern(true)]
    fn literal(&self) {}

    #[message_pattern("a", transport = Tcp)]
    fn transport_case(&self) {}

    #[message_pattern("a", transport = "tcp")]
    fn transport_text(&self) {}

    #[message_pattern("a", extras = 1)]
    fn extras(&self) {}

    #[message_pattern("a", concurrency = 0)]
    fn concurrency(&self) {}

    #[message_pattern("a", interceptors = first)]
    fn interceptors(&self) {}
}

struct Other;

#[controller(nam = "shop")]
impl Other {
    #[message_pattern("a")]
    fn fine(&self) {}
}

fn main() {}
