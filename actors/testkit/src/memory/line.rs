// SPDX-License-Identifier: MIT OR Apache-2.0
//! One direction of an in-memory connection: whole frames, bounded by bytes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use martlet_core::transport::PacketId;
use martlet_core::{Headers, Route, SessionError};
use parking_lot::Mutex;

/// What travels.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    /// An encoded packet.
    Packet { bytes: Bytes, headers: Headers },
    /// An encoded request or event that a hub routed.
    Delivery(HubDelivery),
    /// A request of the receiver's reached nobody.
    Unreachable(PacketId),
    /// The caller of the request with this raw id has lost interest.
    Cancel(Bytes),
}

#[derive(Debug, Clone)]
pub(super) struct HubDelivery {
    pub(super) bytes: Bytes,
    pub(super) headers: Headers,
    /// The subscription that matched.
    pub(super) route: Route,
    /// What it was published to.
    pub(super) subject: Route,
    pub(super) tag: u64,
    /// The session that waits for the reply.
    pub(super) reply: Option<u64>,
}

impl Frame {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Packet { bytes, .. } | Self::Delivery(HubDelivery { bytes, .. }) => bytes.len(),
            Self::Unreachable(_) | Self::Cancel(_) => PacketId::LEN,
        }
    }
}

#[derive(Debug)]
pub(super) struct Line {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    finished: bool,
    reader_gone: bool,
    broken: Option<SessionError>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Line {
    pub(super) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { capacity, state: Mutex::default() })
    }

    /// Puts a frame in, whatever the capacity.
    pub(super) fn force(&self, frame: Frame) {
        let mut state = self.state.lock();
        if state.finished || state.reader_gone || state.broken.is_some() {
            return;
        }
        state.bytes += frame.len();
        state.frames.push_back(frame);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Ready when the line can take a frame.
    pub(super) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let mut state = self.state.lock();
        if let Some(error) = &state.broken {
            return Poll::Ready(Err(error.clone()));
        }
        if state.reader_gone {
            return Poll::Ready(Err(SessionError::lost("the peer has gone")));
        }
        if state.bytes >= self.capacity {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, SessionError>>> {
        let mut state = self.state.lock();
        if let Some(error) = &state.broken {
            return Poll::Ready(Some(Err(error.clone())));
        }
        if let Some(frame) = state.frames.pop_front() {
            state.bytes -= frame.len();
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if state.finished {
            return Poll::Ready(None);
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Frames that wait to be read.
    pub(super) fn waiting(&self) -> usize {
        self.state.lock().frames.len()
    }

    /// Nothing more will be written; what was written is still read.
    pub(super) fn finish(&self) {
        let mut state = self.state.lock();
        state.finished = true;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// The reader is gone: writing fails from now on.
    pub(super) fn close_reader(&self) {
        let mut state = self.state.lock();
        state.reader_gone = true;
        state.frames.clear();
        state.bytes = 0;
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }

    /// Cuts the line: both ends fail, what was not read is lost.
    pub(super) fn cut(&self, error: &SessionError) {
        let mut state = self.state.lock();
        state.broken.get_or_insert_with(|| error.clone());
        state.frames.clear();
        state.bytes = 0;
        for waker in [state.reader.take(), state.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}
