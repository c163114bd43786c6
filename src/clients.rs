// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clients declared together, by name: NestJS's `ClientsModule`.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;

use martlet_core::ClientProxy;
use serde_json::Value;

use crate::config::{self, ConfigError, Transport};

/// Named clients, declared together and handed to a service with
/// [`Microservice::clients`](crate::Microservice::clients). Handlers get them by name
/// (`request.client("orders")`) or by type ([`Client`](crate::Client)); the service closes them.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use martlet::{Clients, Microservice, Transport};
///
/// let clients = Clients::from_json(r#"{
///     "orders": {"transport": "TCP", "options": {"host": "orders", "port": 3000}},
///     "stock": "tcp://stock:3000?timeout=2000"
/// }"#)?
/// .with("billing", Transport::from_env("billing")?.into_client()?);
/// Microservice::new().clients(clients).start().await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct Clients {
    clients: BTreeMap<String, ClientProxy>,
}

impl Clients {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares one more; of two with one name the later is kept.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, client: impl Into<ClientProxy>) -> Self {
        self.clients.insert(name.into(), client.into());
        self
    }

    /// Declares one that something has to be waited for first (a secret store, a lookup): NestJS's
    /// `registerAsync` with a factory.
    ///
    /// # Errors
    ///
    /// The factory's.
    pub async fn with_factory<C, E, Fut>(
        self,
        name: impl Into<String>,
        factory: impl FnOnce() -> Fut,
    ) -> Result<Self, E>
    where
        C: Into<ClientProxy>,
        Fut: Future<Output = Result<C, E>>,
    {
        let client = factory().await?;
        Ok(self.with(name, client))
    }

    /// Declares what a configuration has: a name and a transport each.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Client`] names the client whose options are wrong.
    pub fn from_config(
        config: impl IntoIterator<Item = (impl Into<String>, Transport)>,
    ) -> Result<Self, ConfigError> {
        let mut clients = Self::new();
        for (name, transport) in config {
            let name = name.into();
            match transport.into_client() {
                Ok(client) => clients = clients.with(name, client),
                Err(source) => return Err(ConfigError::Client { name, source: Box::new(source) }),
            }
        }
        Ok(clients)
    }

    /// Reads an object of names and transports (see [`Transport::from_value`]) from JSON text.
    ///
    /// # Errors
    ///
    /// As [`from_config`](Self::from_config), or that it is no such object.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let Value::Object(members) = config::json(text)? else {
            let reason = "clients are an object: a name and a transport each".to_owned();
            return Err(ConfigError::Data { reason });
        };
        let mut config = Vec::new();
        for (name, value) in members {
            match Transport::from_value(value) {
                Ok(transport) => config.push((name, transport)),
                Err(source) => return Err(ConfigError::Client { name, source: Box::new(source) }),
            }
        }
        Self::from_config(config)
    }

    /// Reads the same from a JSON file.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json), or that the file cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::from_json(&config::file(path.as_ref())?)
    }

    /// A client by its name.
    pub fn get(&self, name: &str) -> Option<&ClientProxy> {
        self.clients.get(name)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.clients.keys().map(String::as_str)
    }
}

impl IntoIterator for Clients {
    type Item = (String, ClientProxy);
    type IntoIter = std::collections::btree_map::IntoIter<String, ClientProxy>;

    fn into_iter(self) -> Self::IntoIter {
        self.clients.into_iter()
    }
}
