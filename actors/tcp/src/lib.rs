// SPDX-License-Identifier: MIT OR Apache-2.0
//! NestJS's TCP transporter for Martlet: frames of `<length>#<json>` on a plain or encrypted connection.
//!
//! The protocol is in `docs/protocol/tcp.md`; an unmodified NestJS 10, 11 or 12 peer cannot tell the
//! difference, in either direction.
//!
//! | option | side | default |
//! |---|---|---|
//! | `host`, `port` | both | `localhost`, 3000 |
//! | `tlsOptions` | both | none |
//! | `maxBufferSize` | both | 134,217,728 UTF-16 code units |
//! | `incompleteMessageTimeout` | both | 30,000 ms |
//! | `maxSendBufferSize` | both | 134,217,728 bytes |
//! | `retryAttempts`, `retryDelay` | both | 0, 0 ms |
//!
//! The rest is with [`TcpServerOptions`] and [`TcpClientOptions`].
#![warn(clippy::print_stdout)]

pub mod client;
pub mod options;
pub mod server;
pub mod session;
pub mod tls;
pub mod wire;

pub use client::TcpClient;
pub use options::{TcpClientOptions, TcpProtocol, TcpServerOptions};
pub use server::{TcpListening, TcpServer};
pub use session::TcpContext;
pub use tls::{Pem, TlsClientOptions, TlsServerOptions};
pub use wire::{Framing, LengthDelimited, NestFraming};
