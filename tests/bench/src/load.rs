// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TCP load generator: prebuilt frames, one task per connection, every reply checked.
//!
//! It has to cost less per request than any server it measures. So a slot (one request in flight)
//! owns its frame and the reply it expects, of which only the running number changes; replies are
//! compared as bytes, and parsed only when a server spells them differently.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};

use crate::report::Report;
use crate::service::{self, Reply};
use crate::window::Window;
use crate::{Result, frame};

/// One load run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub address: SocketAddr,
    /// Connections to open.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Spread the calls over this many filler routes instead of calling [`service::SUM`].
    pub spread: Option<u32>,
}

/// Runs a load on the current thread's runtime; a wrong, missing or additional reply is an error.
pub async fn run(plan: Plan, warmup: Duration, window: Window) -> Result<Report> {
    LocalSet::new().run_until(run_local(plan, warmup, window.into())).await
}

async fn run_local(plan: Plan, warmup: Duration, window: Rc<Window>) -> Result<Report> {
    let mut tasks = JoinSet::new();
    for number in 0..plan.connections {
        let stream = TcpStream::connect(plan.address).await?;
        stream.set_nodelay(true)?;
        let connection = Connection::new(stream, number, &plan, window.clone());
        tasks.spawn_local(connection.run());
    }
    let report = window.measure_tasks(warmup, tasks).await?;
    Ok(Report {
        target: format!("tcp://{}", plan.address),
        connections: plan.connections,
        depth: plan.depth,
        ..report
    })
}

/// An id has NestJS's 21 digits: the slot's number, the connection's and the running one.
const SLOT_DIGITS: usize = 5;
const ID_DIGITS: usize = SLOT_DIGITS + 8 + 8;

/// One request in flight.
struct Slot {
    frame: Vec<u8>,
    expected: Vec<u8>,
    sum: i64,
    sent: Option<Instant>,
}

impl Slot {
    fn new(connection: usize, number: usize, spread: bool) -> Self {
        let pattern = if spread { service::filler(0) } else { service::SUM.to_owned() };
        let data = [number as i64 % 90 + 10, 2, 3, 4, 5];
        let sum = data.iter().sum();
        let id = format!("{number:05x}{connection:08x}{:08x}", 0);
        let [a, b, c, d, e] = data;
        let body = format!(r#"{{"pattern":{pattern},"data":[{a},{b},{c},{d},{e}],"id":"{id}"}}"#);
        let mut frame = Vec::new();
        frame::push(&mut frame, body.as_bytes());
        let expected = format!(r#"{{"response":{sum},"isDisposed":true,"id":"{id}"}}"#).into_bytes();
        Self { frame, expected, sum, sent: None }
    }

    /// Makes the frame and the expected reply those of request number `turn`.
    fn turn(&mut self, turn: u32) {
        let mut digits = [0; 8];
        hexadecimal(turn, &mut digits);
        for text in [&mut self.frame, &mut self.expected] {
            let end = text.len() - 2;
            text[end - digits.len()..end].copy_from_slice(&digits);
        }
    }

    /// Makes the frame call filler route `route`.
    fn route(&mut self, mut route: u32) {
        let Some(start) = memchr::memmem::find(&self.frame, b"\"r") else { return };
        for digit in self.frame[start + 2..start + 8].iter_mut().rev() {
            *digit = b'0' + (route % 10) as u8;
            route /= 10;
        }
    }
}

fn hexadecimal(mut number: u32, digits: &mut [u8; 8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

struct Connection {
    stream: TcpStream,
    slots: Vec<Slot>,
    in_flight: usize,
    turn: u32,
    spread: Option<u32>,
    random: u32,
    out: Vec<u8>,
    window: Rc<Window>,
}

impl Connection {
    fn new(stream: TcpStream, number: usize, plan: &Plan, window: Rc<Window>) -> Self {
        let slots = (0..plan.depth).map(|slot| Slot::new(number, slot, plan.spread.is_some())).collect();
        Self {
            stream,
            slots,
            in_flight: 0,
            turn: 0,
            spread: plan.spread,
            random: number as u32 * 2 + 1,
            out: Vec::new(),
            window,
        }
    }

    async fn run(mut self) -> Result<()> {
        let now = Instant::now();
        for slot in 0..self.slots.len() {
            self.send(slot, now);
        }
        let mut input = Vec::with_capacity(64 * 1024);
        let mut written = 0;
        while self.in_flight > 0 {
            if written < self.out.len() {
                match self.stream.try_write(&self.out[written..]) {
                    Ok(bytes) => written += bytes,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let bytes = if written == self.out.len() {
                self.out.clear();
                written = 0;
                self.stream.read_buf(&mut input).await?
            } else {
                // Wait for either, so that two full socket buffers cannot lock both ends.
                let (mut read, write) = self.stream.split();
                tokio::select! {
                    bytes = read.read_buf(&mut input) => bytes?,
                    ready = write.writable() => { ready?; continue }
                }
            };
            if bytes == 0 {
                return Err("the server closed the connection".into());
            }
            self.take(&mut input)?;
        }
        if input.is_empty() { Ok(()) } else { Err("more came than was asked for".into()) }
    }

    /// Sends the slot's next request.
    fn send(&mut self, slot: usize, now: Instant) {
        let slot = &mut self.slots[slot];
        self.turn = self.turn.wrapping_add(1);
        slot.turn(self.turn);
        if let Some(routes) = self.spread {
            self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let route = (u64::from(self.random) * u64::from(routes.max(2) - 1)) >> 32;
            slot.route(1 + route as u32);
        }
        slot.sent = Some(now);
        self.in_flight += 1;
        self.out.extend_from_slice(&slot.frame);
    }

    /// Checks the replies that have come and sends the next request for each.
    fn take(&mut self, input: &mut Vec<u8>) -> Result<()> {
        let now = Instant::now();
        let mut rest = input.as_slice();
        while let Some(body) = frame::next(&mut rest)? {
            let number = self.matching(body)?;
            let slot = &mut self.slots[number];
            let Some(sent) = slot.sent.take() else {
                return Err(format!("a second reply: {}", String::from_utf8_lossy(body)).into());
            };
            self.in_flight -= 1;
            self.window.count(now - sent)?;
            if self.window.is_sending() {
                self.send(number, now);
            }
        }
        let used = input.len() - rest.len();
        input.drain(..used);
        Ok(())
    }

    /// The slot whose reply `body` is.
    fn matching(&self, body: &[u8]) -> Result<usize> {
        let start = body.len().saturating_sub(ID_DIGITS + 2);
        if let Some(number) = slot_in(&body[start..])
            && self.slots.get(number).is_some_and(|slot| slot.expected == body)
        {
            return Ok(number);
        }
        let wrong = || format!("a wrong reply: {}", String::from_utf8_lossy(body));
        let reply: Reply<'_> = serde_json::from_slice(body).map_err(|_| wrong())?;
        let number = slot_in(reply.id.as_bytes()).ok_or_else(wrong)?;
        let slot = self.slots.get(number).ok_or_else(wrong)?;
        let end = slot.expected.len() - 2;
        let same = slot.expected[end - ID_DIGITS..end] == *reply.id.as_bytes()
            && reply.is_disposed
            && reply.err.is_none()
            && reply.response.is_some_and(|value| value.get().parse() == Ok(slot.sum));
        if same { Ok(number) } else { Err(wrong().into()) }
    }
}

fn slot_in(id: &[u8]) -> Option<usize> {
    let digits = std::str::from_utf8(id.get(..SLOT_DIGITS)?).ok()?;
    usize::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::Service;
    use crate::window::Length;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    /// Loads a server that passes every reply through `change`, which gets the reply's number too.
    async fn check(change: fn(usize, String) -> String) -> Result<Report> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let service = Service::new(10);
            let (mut stream, _) = listener.accept().await?;
            let mut input = Vec::new();
            let mut replies = 0;
            while stream.read_buf(&mut input).await? > 0 {
                let mut rest = input.as_slice();
                while let Some(packet) = frame::next(&mut rest)? {
                    let (mut reply, mut output) = (Vec::new(), Vec::new());
                    service.answer(packet, &mut reply)?;
                    replies += 1;
                    for reply in change(replies, String::from_utf8(reply)?).lines() {
                        frame::push(&mut output, reply.as_bytes());
                    }
                    stream.write_all(&output).await?;
                }
                let used = input.len() - rest.len();
                input.drain(..used);
            }
            Result::Ok(())
        });
        let plan = Plan { address, connections: 1, depth: 3, spread: Some(10) };
        let report = run(plan, Duration::ZERO, Window::new(None, Length::Count(50))).await;
        server.abort();
        report
    }

    #[tokio::test]
    async fn replies_are_accepted_in_any_spelling() {
        assert_eq!(check(|_, reply| reply).await.unwrap().requests, 50);
        let respell = |_, reply: String| {
            let Reply { response, id, .. } = serde_json::from_str(&reply).unwrap();
            format!(r#"{{ "id":"{id}", "isDisposed":true, "response":{} }}"#, response.unwrap())
        };
        assert_eq!(check(respell).await.unwrap().requests, 50);
    }

    #[tokio::test]
    async fn a_wrong_reply_ends_the_run() {
        let wrong: [fn(usize, String) -> String; 4] = [
            |number, reply| if number == 20 { reply.replace("response\":", "response\":1") } else { reply },
            |number, reply| if number == 20 { reply.replace("true", "false") } else { reply },
            |number, reply| {
                if number == 20 { reply.replace("\"id\":\"0", "\"id\":\"1") } else { reply }
            },
            |number, reply| if number == 20 { format!("{reply}\n{reply}") } else { reply },
        ];
        for change in wrong {
            assert!(check(change).await.is_err());
        }
    }
}
