// SPDX-License-Identifier: MIT OR Apache-2.0
//! The way to a broker: TCP, TLS, WebSocket.

use async_tungstenite::tungstenite::client::IntoClientRequest;
use async_tungstenite::tungstenite::http::HeaderValue;
use martlet_core::error::SessionError;
use martlet_core::options::percent_decoded;
use rumqttc_core::{
    AsyncReadWrite, TlsConfiguration, TlsError, WsAdapter, tls_connect, validate_response_headers,
};
use tokio::net::TcpStream;

use crate::options::{MqttTlsOptions, without_secrets};

/// A connection to a broker.
pub(crate) type Stream = Box<dyn AsyncReadWrite>;

/// Where a broker is, out of the option `url`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) tls: bool,
    /// The path, for WebSocket.
    pub(crate) websocket: Option<String>,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
}

impl Target {
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("mqtt", url));
        let (tls, websocket, default_port) = match scheme {
            "mqtt" | "tcp" => (false, false, 1883),
            "mqtts" | "ssl" | "tls" => (true, false, 8883),
            "ws" => (false, true, 80),
            "wss" => (true, true, 443),
            other => return Err(format!("unknown scheme {other:?}: mqtt, mqtts, ws and wss are known")),
        };
        let rest = rest.split('#').next().unwrap_or(rest);
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (login, address) = match authority.rsplit_once('@') {
            Some((login, address)) => (Some(login), address),
            None => (None, authority),
        };
        let (host, port) = match address.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or("an IPv6 address needs a closing bracket")?;
                (host, port.strip_prefix(':'))
            }
            None => match address.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            },
        };
        if host.is_empty() {
            return Err("there is no host".to_owned());
        }
        let port = match port {
            None | Some("") => default_port,
            Some(port) => port.parse().map_err(|_| format!("bad port {port:?}"))?,
        };
        let (username, password) = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
            None | Some(("", "")) => (None, None),
            Some((user, "")) => (Some(percent_decoded(user)), None),
            Some((user, password)) => (Some(percent_decoded(user)), Some(percent_decoded(password))),
        };
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let websocket = websocket.then_some(path);
        Ok(Self { tls, websocket, host: host.to_owned(), port, username, password })
    }
}

/// Opens the stream that packets travel on.
pub(crate) async fn connect(
    url: &str,
    target: &Target,
    tls: Option<&MqttTlsOptions>,
) -> Result<Stream, SessionError> {
    let shown = without_secrets(url);
    // Read before anything is sent: a wrong option is told at once.
    let config = match target.tls {
        true => Some(tls.unwrap_or(&MqttTlsOptions::new()).load()?.config),
        false if tls.is_some() => {
            return Err(SessionError::fatal(format!(
                "option tls needs an address of mqtts:// or wss:// in option url, which is {shown}"
            )));
        }
        false => None,
    };
    let tcp = TcpStream::connect((target.host.as_str(), target.port)).await.map_err(|error| {
        SessionError::refused(format!("option url: the broker at {shown} cannot be reached: {error}"))
    })?;
    // Packets are gathered here; the kernel need not wait for more.
    tcp.set_nodelay(true)?;
    let stream: Stream = match config {
        None => Box::new(tcp),
        Some(config) => {
            let config = TlsConfiguration::Rustls(config);
            let connected = tls_connect(&target.host, target.port, &config, Box::new(tcp)).await;
            connected.map_err(|error| handshake_error(&shown, &error))?
        }
    };
    match &target.websocket {
        None => Ok(stream),
        Some(path) => upgrade(&shown, target, path, stream).await,
    }
}

async fn upgrade(shown: &str, target: &Target, path: &str, stream: Stream) -> Result<Stream, SessionError> {
    let fatal = |error: &dyn std::fmt::Display| {
        SessionError::fatal(format!("option url: {shown} is no WebSocket address of an MQTT broker: {error}"))
    };
    let scheme = if target.tls { "wss" } else { "ws" };
    let host = if target.host.contains(':') { format!("[{}]", target.host) } else { target.host.clone() };
    let address = format!("{scheme}://{host}:{}{path}", target.port);
    let mut request = address.into_client_request().map_err(|error| fatal(&error))?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static("mqtt"));
    let (socket, response) =
        async_tungstenite::tokio::client_async(request, stream).await.map_err(|error| match &error {
            async_tungstenite::tungstenite::Error::Io(_) => SessionError::refused(format!(
                "option url: the WebSocket of the broker at {shown} cannot be opened: {error}"
            )),
            other => fatal(other),
        })?;
    validate_response_headers(&response).map_err(|error| fatal(&error))?;
    Ok(Box::new(WsAdapter::new(socket)))
}

/// A handshake that failed: a wrong certificate is not retried, a broken line is.
fn handshake_error(shown: &str, error: &TlsError) -> SessionError {
    let io = match error {
        TlsError::Io(io) => Some(io),
        _ => None,
    };
    let is_tls = io.is_none_or(|io| io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()));
    let text = format!("option tls: TLS with the broker at {shown} failed: {error}");
    if is_tls { SessionError::fatal(text) } else { SessionError::refused(text) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_the_ports_of_their_schemes() {
        let parse = |url: &str| {
            let target = Target::parse(url).unwrap();
            (target.tls, target.websocket, target.host, target.port)
        };
        let name = || "h".to_owned();
        assert_eq!(parse("mqtt://h"), (false, None, name(), 1883));
        assert_eq!(parse("h:1"), (false, None, name(), 1));
        assert_eq!(parse("mqtts://h/"), (true, None, name(), 8883));
        assert_eq!(parse("ws://h/mqtt?a=1"), (false, Some("/mqtt?a=1".to_owned()), name(), 80));
        assert_eq!(parse("wss://h"), (true, Some("/".to_owned()), name(), 443));
        assert_eq!(parse("mqtt://[::1]:7"), (false, None, "::1".to_owned(), 7));
        let target = Target::parse("mqtt://us%40er:p%3Aw@h").unwrap();
        assert_eq!((target.username.as_deref(), target.password.as_deref()), (Some("us@er"), Some("p:w")));
        for bad in ["http://h", "mqtt://", "mqtt://h:x", "mqtt://[::1"] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
