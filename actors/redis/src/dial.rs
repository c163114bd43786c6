// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use deadpool_redis::{Manager, Pool, PoolError, Runtime};
use martlet_core::Pattern;
use martlet_core::error::{SessionError, SessionErrorKind};
use martlet_core::settlement::Settles;
use martlet_core::transport::{Dial, Role, SessionPlan, TransportId, TransportInfo};
use parking_lot::Mutex;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion,
};

use crate::link::{Link, Settings};
use crate::options::{Address, RedisClientOptions, RedisServerOptions, without_secrets};
use crate::publisher::Publisher;
use crate::session::RedisSession;
use crate::subscriber::{Asked, Subscriber, Target, broker_error};
use crate::tls::Tls;
use crate::wire;

/// What `CLIENT LIST` shows as the library.
const LIBRARY: &[u8] = b"martlet";

/// Opens sessions with a Redis broker: the transporter itself, for either role.
///
/// [`RedisServer`](crate::RedisServer) and [`RedisClient`](crate::RedisClient) put it into the runtime.
#[derive(Clone)]
pub struct RedisDial {
    settings: Arc<Settings>,
    /// Made at the first dial, kept until a session is closed in order.
    pool: Arc<Mutex<Option<Pool>>>,
}

impl std::fmt::Debug for RedisDial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisDial").field("url", &self.url()).finish_non_exhaustive()
    }
}

impl RedisDial {
    /// For the serving side.
    pub fn server(options: &RedisServerOptions) -> Self {
        Self::new(Settings {
            common: options.common(),
            wildcards: options.wildcards,
            wildcard_replies: false,
            max_reply_channels: 1,
            codec: Arc::clone(&options.codec),
        })
    }

    /// For the calling side.
    pub fn client(options: &RedisClientOptions) -> Self {
        Self::new(Settings {
            common: options.common(),
            wildcards: false,
            wildcard_replies: options.wildcard_replies,
            max_reply_channels: options.max_reply_channels,
            codec: Arc::clone(&options.codec),
        })
    }

    fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), pool: Arc::default() }
    }

    /// The address of the broker, without secrets.
    pub fn url(&self) -> String {
        let common = &self.settings.common;
        match common.address() {
            Ok(address) => address.url(),
            Err(_) => common.url.as_deref().map(without_secrets).unwrap_or_default(),
        }
    }

    /// The publishing pool. The driver's own time limits are off: the session has a watchdog.
    fn pool(&self, address: &Address, tls: Option<&Tls>) -> Result<Pool, SessionError> {
        let mut kept = self.pool.lock();
        if let Some(pool) = kept.as_ref().filter(|pool| !pool.is_closed()) {
            return Ok(pool.clone());
        }
        let common = &self.settings.common;
        let fatal = |error: &dyn std::fmt::Display| {
            SessionError::fatal(format!("the publishing pool cannot be made ({}): {error}", address.url()))
        };
        let info = connection_info(address, tls).map_err(|error| fatal(&error))?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(common.connect_timeout))
            .set_response_timeout(None);
        let manager = Manager::new_with_config(info, config).map_err(|error| fatal(&error))?;
        let pool = Pool::builder(manager)
            .max_size(common.pool_size.max(1))
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(common.connect_timeout))
            .create_timeout(Some(common.connect_timeout))
            .recycle_timeout(Some(common.connect_timeout))
            .build()
            .map_err(|error| fatal(&error))?;
        *kept = Some(pool.clone());
        Ok(pool)
    }

    /// Says who we are and subscribes; ready when the broker has done all of it.
    async fn set_up(
        &self,
        subscriber: &mut Subscriber,
        address: &Address,
        plan: &SessionPlan,
    ) -> Result<(), SessionError> {
        let (settings, shown) = (&self.settings, address.url());
        match (&address.username, &address.password) {
            (None, Some(password)) => subscriber.ask(Asked::Auth, &[b"AUTH", password.as_bytes()]),
            (Some(user), Some(password)) => {
                subscriber.ask(Asked::Auth, &[b"AUTH", user.as_bytes(), password.as_bytes()]);
            }
            (Some(_), None) => return Err(SessionError::fatal("option username needs option password")),
            (None, None) => {}
        }
        if let Some(name) = &settings.common.connection_name {
            subscriber.ask(Asked::Name, &[b"CLIENT", b"SETNAME", name.as_bytes()]);
        }
        subscriber.ask(Asked::Library, &[b"CLIENT", b"SETINFO", b"LIB-NAME", LIBRARY]);
        subscriber.ask(Asked::ClientId, &[b"CLIENT", b"ID"]);
        if address.db != 0 {
            subscriber.ask(Asked::Select, &[b"SELECT", address.db.to_string().as_bytes()]);
        }
        for subscription in &plan.subscriptions {
            Link::serve(settings, subscriber, subscription);
        }
        if plan.role == Role::Client && settings.wildcard_replies {
            subscriber.subscribe(Bytes::from_static(wire::GLOB_REPLIES), true, Target::Reply);
        }
        std::future::poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = subscriber.poll_write(cx) {
                return Poll::Ready(Err(error));
            }
            let read = subscriber.poll_read(cx);
            while let Some((asked, result)) = subscriber.answers.pop_front() {
                let Err(text) = result else { continue };
                match (plan.role, &asked) {
                    (Role::Client, Asked::Subscribe { channel, glob: true }) => {
                        // REDIS-11: a user may lack the right; other replies do not need it.
                        subscriber.forget(channel, true);
                        tracing::debug!(target: "martlet", "wildcardReplies is off: {text}");
                    }
                    (Role::Server, Asked::Subscribe { channel, glob }) if wire::is_cancel_channel(channel) => {
                        // REDIS-16: served all the same.
                        subscriber.forget(channel, *glob);
                        tracing::debug!(target: "martlet", "no cancellations: {text}");
                    }
                    // It also tells whether a password is needed; some users may not ask.
                    (_, Asked::ClientId) if !text.starts_with("NOAUTH") => {}
                    _ => return Poll::Ready(Err(broker_error(&shown, Some(&asked), &text))),
                }
            }
            match read {
                Err(error) if error.kind() != SessionErrorKind::Lost => Poll::Ready(Err(error)),
                Err(error) => Poll::Ready(Err(SessionError::refused(format!(
                    "{error} while the session was made: is it a Redis server, and does it want TLS (option tls)?"
                )))),
                Ok(()) if subscriber.has_asked() => Poll::Pending,
                Ok(()) => Poll::Ready(Ok(())),
            }
        })
        .await
    }

    async fn open(&self, plan: &SessionPlan) -> Result<RedisSession, SessionError> {
        let settings = &self.settings;
        let address = settings.common.address()?;
        let tls = match (address.tls, &settings.common.tls) {
            (false, _) => None,
            (true, options) => Some(Tls::load(&options.clone().unwrap_or_default())?),
        };
        let mut subscriber = Subscriber::connect(&address, tls.as_ref(), &settings.common).await?;
        self.set_up(&mut subscriber, &address, plan).await?;
        let pool = self.pool(&address, tls.as_ref())?;
        let mut publisher = Publisher::new(&pool).await.map_err(|error| unpooled(&address, &error))?;
        if let Some(name) = &settings.common.connection_name {
            publisher.set_name(name);
        }
        let link = Link::new(Arc::clone(settings), plan.role, address.url(), pool, subscriber, publisher);
        Ok(RedisSession::new(link))
    }
}

fn connection_info(address: &Address, tls: Option<&Tls>) -> redis::RedisResult<ConnectionInfo> {
    let at = match tls {
        None => ConnectionAddr::Tcp(address.host.clone(), address.port),
        Some(_) => ConnectionAddr::TcpTls {
            host: address.host.clone(),
            port: address.port,
            insecure: false,
            tls_params: None,
        },
    };
    let info = at.into_connection_info()?;
    let mut settings = info.redis_settings().clone().set_db(address.db).set_protocol(ProtocolVersion::RESP2);
    if let Some(user) = &address.username {
        settings = settings.set_username(user);
    }
    if let Some(password) = &address.password {
        settings = settings.set_password(password);
    }
    let info = info.set_redis_settings(settings).set_tcp_settings(TcpSettings::default().set_nodelay(true));
    match tls {
        None => Ok(info),
        Some(tls) => {
            Ok(Client::build_with_tls(info, tls.certificates.clone())?.get_connection_info().clone())
        }
    }
}

/// Why the pool gave no connection. The credentials are right: the subscribing connection has them, too.
fn unpooled(address: &Address, error: &PoolError) -> SessionError {
    let shown = address.url();
    match error {
        PoolError::Timeout(_) => SessionError::refused(format!(
            "the publishing pool gave no connection in time ({shown}, options poolSize and connectTimeout): {error}"
        )),
        _ => SessionError::refused(format!("no publishing connection ({shown}): {error}")),
    }
}

impl Dial for RedisDial {
    type Session = RedisSession;

    fn info(&self) -> TransportInfo {
        TransportInfo {
            subscribes: true,
            settles: Settles::Never("Redis pub/sub has no acknowledgement"),
            format: self.settings.codec.format(),
            ..TransportInfo::new(TransportId::REDIS, "redis")
        }
    }

    async fn dial(&self, plan: SessionPlan) -> Result<RedisSession, SessionError> {
        let limit = self.settings.common.connect_timeout;
        match tokio::time::timeout(limit, self.open(&plan)).await {
            Ok(opened) => opened,
            Err(_) => {
                let url = self.url();
                let hint = if url.starts_with("rediss") { "; does it speak TLS?" } else { "" };
                Err(SessionError::refused(format!(
                    "the broker did not answer within {limit:?} ({url}, option connectTimeout{hint})"
                )))
            }
        }
    }

    fn check_pattern(&self, pattern: &Pattern) -> Result<(), String> {
        wire::check_channel(pattern.route())
    }
}
