// SPDX-License-Identifier: MIT OR Apache-2.0
//! The service every baseline runs: `{"cmd":"sum"}` over a JSON array, with NestJS's packets.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use slab::Slab;

use crate::{Result, frame};

/// The pattern every row but the spread one calls.
pub const SUM: &str = r#"{"cmd":"sum"}"#;

/// The event that the rows of events send: its numbers are added up and thrown away.
pub const NOTED: &str = "noted";

/// The pattern that answers how many events of [`NOTED`] were handled.
pub const COUNTED: &str = "counted";

/// The pattern of filler route `number`; all have the same length up to a million routes.
pub fn filler(number: u32) -> String {
    format!(r#"{{"cmd":"r{number:06}"}}"#)
}

/// A request or event, its parts left as the text they came in.
#[derive(Debug, Deserialize)]
pub struct Packet<'a> {
    /// What is called.
    #[serde(borrow)]
    pub pattern: &'a RawValue,
    /// The argument.
    #[serde(borrow, default)]
    pub data: Option<&'a RawValue>,
    /// What the reply repeats; absent from an event.
    #[serde(borrow, default)]
    pub id: Option<&'a RawValue>,
}

/// A reply, its parts left as the text they came in.
#[derive(Debug, Deserialize)]
pub struct Reply<'a> {
    /// The value.
    #[serde(borrow, default)]
    pub response: Option<&'a RawValue>,
    /// The error.
    #[serde(borrow, default)]
    pub err: Option<&'a RawValue>,
    /// Whether this reply is the last one.
    #[serde(rename = "isDisposed", default)]
    pub is_disposed: bool,
    /// The request's id; RabbitMQ has it beside the packet.
    #[serde(borrow, default)]
    pub id: &'a str,
}

/// Parses one packet.
///
/// UTF-8 is checked once for the whole packet: string by string, as `from_slice` does it, cost 8 %
/// of the loop server's time per request.
pub fn parse<'a, T: Deserialize<'a>>(packet: &'a [u8]) -> Result<T> {
    Ok(serde_json::from_str(std::str::from_utf8(packet)?)?)
}

type Handler = fn(&Service, &RawValue) -> serde_json::Result<i64>;

/// The routes, by the raw text of their pattern.
#[derive(Debug)]
pub struct Service {
    routes: HashMap<Box<str>, Handler>,
    noted: AtomicU64,
    without_ids: bool,
}

impl Service {
    /// A service with `routes` routes: [`SUM`] and fillers that do the same.
    pub fn new(routes: u32) -> Self {
        let fillers = (1..routes).map(filler);
        let patterns = std::iter::once(SUM.to_owned()).chain(fillers);
        let routes = patterns.map(|pattern| (pattern.into(), sum as Handler)).collect();
        Self { routes, noted: AtomicU64::new(0), without_ids: false }
    }

    /// A service for brokers: [`SUM`], the event [`NOTED`] and [`COUNTED`]. On RabbitMQ replies have no id.
    pub fn of_broker(without_ids: bool) -> Self {
        let mut service = Self { without_ids, ..Self::new(1) };
        service.routes.insert(format!("{NOTED:?}").into(), note);
        service.routes.insert(format!("{COUNTED:?}").into(), counted);
        service
    }

    /// Handles one packet and appends its reply's JSON to `out`; an event appends nothing.
    pub fn answer(&self, packet: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let packet: Packet<'_> = parse(packet)?;
        let handler = self.routes.get(packet.pattern.get());
        let outcome = handler.map(|handler| handler(self, packet.data.unwrap_or(RawValue::NULL)));
        let Some(id) = packet.id else { return Ok(()) };
        match outcome {
            Some(Ok(sum)) => {
                out.extend_from_slice(b"{\"response\":");
                serde_json::to_writer(&mut *out, &sum)?;
                if self.without_ids {
                    out.extend_from_slice(b",\"isDisposed\":true}");
                    return Ok(());
                }
                out.extend_from_slice(b",\"isDisposed\":true,\"id\":");
                out.extend_from_slice(id.get().as_bytes());
                out.push(b'}');
            }
            Some(Err(_)) => {
                out.extend_from_slice(
                    b"{\"err\":{\"status\":\"error\",\"message\":\"Internal server error\"},\"isDisposed\":true,\"id\":",
                );
                out.extend_from_slice(id.get().as_bytes());
                out.push(b'}');
            }
            None => {
                out.extend_from_slice(b"{\"id\":");
                out.extend_from_slice(id.get().as_bytes());
                out.extend_from_slice(
                    b",\"status\":\"error\",\"err\":\"There is no matching message handler defined in the remote service.\"}",
                );
            }
        }
        Ok(())
    }
}

fn sum(_: &Service, data: &RawValue) -> serde_json::Result<i64> {
    let numbers: Vec<i64> = serde_json::from_str(data.get())?;
    Ok(numbers.iter().fold(0, |sum, number| sum.wrapping_add(*number)))
}

fn note(service: &Service, data: &RawValue) -> serde_json::Result<i64> {
    std::hint::black_box(sum(service, data)?);
    // One thread counts.
    service.noted.store(service.noted.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    Ok(0)
}

fn counted(service: &Service, _: &RawValue) -> serde_json::Result<i64> {
    Ok(service.noted.load(Ordering::Relaxed) as i64)
}

/// A call as it leaves [`Calls::begin`].
#[derive(Debug)]
pub struct Begun<'a> {
    /// Its key in the correlation map.
    pub key: usize,
    /// Its id, which is also in the packet.
    pub id: &'a str,
    /// Its packet as JSON.
    pub packet: &'a [u8],
}

#[derive(Serialize)]
struct Request<'a> {
    pattern: &'a RawValue,
    data: &'a [i64],
    id: &'a str,
}

#[derive(Serialize)]
struct Event<'a> {
    pattern: &'a str,
    data: &'a [i64],
}

struct Call {
    turn: usize,
    sum: i64,
    sent: Instant,
}

/// A client's calls in flight: makes their packets, and checks the replies against them.
#[derive(Default)]
pub struct Calls {
    pending: Slab<Call>,
    pattern: Box<RawValue>,
    turn: usize,
    id: Vec<u8>,
    packet: Vec<u8>,
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("pending", &self.pending.len()).finish_non_exhaustive()
    }
}

impl Calls {
    /// No calls yet.
    pub fn new() -> Result<Self> {
        let pattern = RawValue::from_string(SUM.to_owned())?;
        Ok(Self { pattern, ..Self::default() })
    }

    /// Whether no call waits for its reply.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Enters the next call and serialises its packet.
    pub fn begin(&mut self, now: Instant) -> Result<Begun<'_>> {
        self.turn += 1;
        let data = [(self.turn % 90 + 10) as i64, 2, 3, 4, 5];
        let key = self.pending.insert(Call { turn: self.turn, sum: data.iter().sum(), sent: now });
        // The key finds the call, the turn tells it from earlier ones under the same key.
        self.id.clear();
        frame::push_number(&mut self.id, key);
        self.id.push(b'.');
        frame::push_number(&mut self.id, self.turn);
        let id = std::str::from_utf8(&self.id)?;
        let request = Request { pattern: &self.pattern, data: &data, id };
        self.packet.clear();
        serde_json::to_writer(&mut self.packet, &request)?;
        Ok(Begun { key, id, packet: &self.packet })
    }

    /// A packet of the event [`NOTED`].
    pub fn event(&mut self) -> Result<Vec<u8>> {
        self.turn += 1;
        let data = [(self.turn % 90 + 10) as i64, 2, 3, 4, 5];
        Ok(serde_json::to_vec(&Event { pattern: NOTED, data: &data })?)
    }

    /// Takes out the call that `reply` answers, and tells since when it waited.
    pub fn end(&mut self, reply: &Reply<'_>) -> Result<Instant> {
        let wrong = || format!("a wrong reply: {reply:?}");
        let (key, turn) = reply.id.split_once('.').ok_or_else(wrong)?;
        let (key, turn): (usize, usize) = (key.parse()?, turn.parse()?);
        let call = self.pending.try_remove(key).ok_or_else(wrong)?;
        let sum: i64 = serde_json::from_str(reply.response.ok_or_else(wrong)?.get())?;
        let right = call.turn == turn && call.sum == sum && reply.is_disposed && reply.err.is_none();
        if right { Ok(call.sent) } else { Err(wrong().into()) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(packet: &str, reply: &str) {
        let mut out = Vec::new();
        Service::new(10).answer(packet.as_bytes(), &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), reply);
    }

    #[test]
    fn replies_are_the_bytes_nestjs_sends() {
        check(
            r#"{"pattern":{"cmd":"sum"},"data":[1,2,3],"id":"a"}"#,
            r#"{"response":6,"isDisposed":true,"id":"a"}"#,
        );
        check(
            r#"{"pattern":{"cmd":"r000009"},"data":[-1],"id":"a"}"#,
            r#"{"response":-1,"isDisposed":true,"id":"a"}"#,
        );
        check(
            r#"{"pattern":{"cmd":"r000010"},"data":[1],"id":"a"}"#,
            r#"{"id":"a","status":"error","err":"There is no matching message handler defined in the remote service."}"#,
        );
        check(
            r#"{"pattern":{"cmd":"sum"},"data":"x","id":1}"#,
            r#"{"err":{"status":"error","message":"Internal server error"},"isDisposed":true,"id":1}"#,
        );
        check(r#"{"pattern":{"cmd":"sum"},"data":[1]}"#, "");
    }

    #[test]
    fn events_are_counted_and_ids_left_out() {
        let service = Service::of_broker(true);
        let mut calls = Calls::new().unwrap();
        let mut out = Vec::new();
        for _ in 0..3 {
            service.answer(&calls.event().unwrap(), &mut out).unwrap();
        }
        assert!(out.is_empty());
        service.answer(br#"{"pattern":"counted","id":"a"}"#, &mut out).unwrap();
        assert_eq!(out, br#"{"response":3,"isDisposed":true}"#);
    }

    #[test]
    fn a_call_accepts_its_own_reply_once() {
        let mut calls = Calls::new().unwrap();
        let packet = calls.begin(Instant::now()).unwrap().packet.to_vec();
        let mut reply = Vec::new();
        Service::new(1).answer(&packet, &mut reply).unwrap();
        let reply: Reply<'_> = serde_json::from_slice(&reply).unwrap();
        let wrong =
            Reply { response: Some(RawValue::TRUE), ..serde_json::from_str(r#"{"id":"0.1"}"#).unwrap() };
        calls.end(&reply).unwrap();
        assert!(calls.is_empty());
        assert!(calls.end(&reply).is_err());
        calls.begin(Instant::now()).unwrap();
        assert!(calls.end(&reply).is_err(), "an earlier reply under the same key");
        calls.begin(Instant::now()).unwrap();
        assert!(calls.end(&wrong).is_err());
    }
}
