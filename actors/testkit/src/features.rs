// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a transporter (and the harness it is tested with) promises to the conformance suite.

use martlet_core::Format;

/// The groups of behaviours that a harness must pass. [`conformance_tests!`](crate::conformance_tests)
/// names them once more, so that each becomes a test; a test of its own sees that both lists agree.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Features {
    /// Format of the payloads. Default JSON.
    pub format: Format,
    /// The largest payload that must come through whole. Default 1 MiB.
    pub large_payload_bytes: usize,
    /// Whether a call that nobody handles ends at once; otherwise its timeout ends it. Default true.
    pub says_nobody: bool,
    /// Group `metadata`: packet metadata crosses, so deadline and trace do. Default true.
    pub metadata: bool,
    /// Group `cancel`: the handler learns that its caller has lost interest. Default false.
    pub cancel: bool,
    /// Group `cuts`: the harness can cut connections and refuse new ones. Default false.
    pub cuts: bool,
    /// Group `raw`: the harness can put bytes of its own on the wire; JSON only. Default false.
    pub raw: bool,
    /// Group `accepts`: the server accepts peers, stops reading at its bounds and refuses connections above
    /// their number. Default false.
    pub accepts: bool,
    /// Group `subscribes`: there is a broker, routes are subscribed and unsubscribed. Default false.
    pub subscribes: bool,
    /// Group `shares`: of the services that serve a route, one gets each message. Default false.
    pub shares: bool,
    /// Group `wildcards`: subscriptions with `*` and `>`. Default false.
    pub wildcards: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            format: Format::Json,
            large_payload_bytes: 1024 * 1024,
            says_nobody: true,
            metadata: true,
            cancel: false,
            cuts: false,
            raw: false,
            accepts: false,
            subscribes: false,
            shares: false,
            wildcards: false,
        }
    }
}

impl Features {
    /// The groups promised, by the names that the macro takes. `core` is always one.
    pub fn groups(&self) -> Vec<&'static str> {
        let groups = [
            ("core", true),
            ("metadata", self.metadata),
            ("cancel", self.cancel),
            ("cuts", self.cuts),
            ("raw", self.raw),
            ("accepts", self.accepts),
            ("subscribes", self.subscribes),
            ("shares", self.shares),
            ("wildcards", self.wildcards),
        ];
        groups.into_iter().filter(|(_, promised)| *promised).map(|(name, _)| name).collect()
    }
}
