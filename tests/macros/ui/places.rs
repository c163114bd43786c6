// SPDX-License-Identifier: MIT OR Apache-2.0
use martlet::{controller, event_pattern, message_pattern};

struct Plain;

impl Plain {
    #[message_pattern("a")]
    fn outside(&self) {}
}

#[event_pattern("a")]
async fn function() {}

#[controller]
struct Shop;

struct Generic<T>(T);

#[controller]
impl<T: 'static> Generic<T> {
    #[message_pattern("a")]
    fn handler(&self) {}
}

#[controller]
impl Default for Plain {
    fn default() -> Self {
        Plain
    }
}

struct Empty;

#[controller]
impl Empty {
    fn helper(&self) {}
}

fn main() {
    martlet::pattern!(null);
    martlet::pattern!(["a", "b"]);
}
