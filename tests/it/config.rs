// SPDX-License-Identifier: MIT OR Apache-2.0
//! Transports and clients from data.

use martlet::{Clients, ConfigError, Transport};

fn text(error: ConfigError) -> String {
    error.to_string()
}

#[test]
fn a_transport_that_nobody_has_is_refused() {
    for transport in ["\"kafka\"", "7", "4", "\"tpc\"", "true"] {
        let error = Transport::from_json(&format!("{{\"transport\":{transport}}}")).unwrap_err();
        assert!(matches!(error, ConfigError::UnknownTransport { .. }), "{transport}: {error}");
        let known = "known are tcp (or 0), redis (or 1), nats (or 2), mqtt (or 3) and rmq (or 5)";
        assert!(text(error).ends_with(known), "{transport}");
    }
    for wrong in ["[]", "{", "{\"transport\":0,\"url\":\"tcp://a\"}", "{\"options\":[]}", "{\"url\":1}"] {
        let error = Transport::from_json(wrong).unwrap_err();
        assert!(matches!(error, ConfigError::Data { .. }), "{wrong}: {error}");
    }
}

#[test]
fn a_variable_that_is_not_set_is_named() {
    let error = Transport::from_env_vars("my-orders", []).unwrap_err();
    assert!(text(error).contains("MARTLET_MY_ORDERS_URL is not set"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = text(Transport::from_file("/no/such/file.json").unwrap_err());
    assert!(error.starts_with("cannot read file /no/such/file.json: "), "{error}");
    Clients::from_file("/no/such/file.json").unwrap_err();
}

#[cfg(feature = "tcp")]
mod tcp {
    use std::time::Duration;

    use martlet::prelude::*;
    use martlet::tcp::{TcpServer, TcpServerOptions};
    use martlet::{ConfigError, Request};

    use super::text;

    fn server(url: &str) -> Result<TcpServerOptions, ConfigError> {
        Transport::from_url(url)?.tcp_server_options()
    }

    #[test]
    fn texts_become_what_the_option_is() {
        let options = server(
            "tcps://127.0.0.1:0?maxBufferSize=1000&incompleteMessageTimeout=250&key=1234&cert=c.pem&requestCert=true",
        )
        .unwrap();
        assert_eq!((options.host.as_str(), options.port), ("127.0.0.1", 0));
        assert_eq!(options.max_buffer_size, 1000);
        assert_eq!(options.incomplete_message_timeout, Duration::from_millis(250));
        let tls = options.tls_options.unwrap();
        // A text that looks like a number stays one where a text is wanted.
        assert_eq!(tls.key, martlet::tcp::Pem::new("1234"));
        assert!(tls.request_cert && tls.reject_unauthorized);
    }

    #[test]
    fn an_unknown_option_names_the_nearest_right_one() {
        let error = text(server("tcp://a?maxBufSize=1").unwrap_err());
        assert!(
            error.starts_with(
                "unknown option maxBufSize for tcp servers: did you mean maxBufferSize? (options are: host, port, "
            ),
            "{error}"
        );
        let error = text(server("tcp://a?max_in_flight=1").unwrap_err());
        assert!(error.contains("did you mean maxInFlight?"), "{error}");
        let error = text(server("tcp://a?tlsOptions.reqestCert=1").unwrap_err());
        assert!(
            error.starts_with(
                "unknown option tlsOptions.reqestCert for tcp servers: did you mean tlsOptions.requestCert?"
            ),
            "{error}"
        );
        let error = text(server("tcp://a?zzz=1").unwrap_err());
        assert!(error.starts_with("unknown option zzz for tcp servers (options are: host"), "{error}");
        let error = text(Transport::from_json(r#"{"transport":"TCP","option":{}}"#).unwrap_err());
        assert!(error.contains("unknown option option for transports: did you mean options?"), "{error}");
    }

    #[test]
    fn an_option_of_the_other_side_is_called_that() {
        let error = text(server("tcp://a?connectTimeout=1").unwrap_err());
        assert_eq!(error, "option connectTimeout is for tcp clients, not for tcp servers");
        let error = text(Transport::from_url("tcp://a?backlog=1").unwrap().into_client().unwrap_err());
        assert_eq!(error, "option backlog is for tcp servers, not for tcp clients");
    }

    #[test]
    fn a_value_that_cannot_be_used_names_its_option() {
        let check = |url: &str| text(server(url).unwrap_err());
        assert_eq!(
            check("tcp://a?maxBufferSize=lots"),
            "option maxBufferSize for tcp servers: \"lots\" is not a number"
        );
        assert_eq!(
            check("tcp://a?tlsOptions.requestCert=maybe"),
            "option tlsOptions.requestCert for tcp servers: \"maybe\" is neither true nor false"
        );
        assert!(check("tcp://a?backlog=-1").starts_with("option backlog for tcp servers: invalid value"));
        assert!(check("tcp://a?tlsOptions=1").contains("is not a group of options"));
        assert!(check("tcp://a?backlog=1&backlog=2").starts_with("option backlog for tcp servers: "));
    }

    #[test]
    fn nest_s_own_forms_are_read() {
        for transport in ["\"tcp\"", "\"TCP\"", "0"] {
            let json = format!("{{\"transport\":{transport},\"options\":{{\"host\":\"h\",\"port\":4000}}}}");
            let transport = Transport::from_json(&json).unwrap();
            assert_eq!(transport.to_string(), "tcp://h:4000");
        }
        // NestJS takes TCP when nothing is said.
        assert_eq!(Transport::from_json("{}").unwrap().to_string(), "tcp://localhost:3000");
        let transport = Transport::from_json(
            r#"{"url":"tcp://a:1?maxBufferSize=5&tlsOptions.ca=x","options":{"port":2,"tlsOptions":{"key":"k"}}}"#,
        )
        .unwrap();
        assert_eq!(
            serde_json::Value::Object(transport.options().clone()),
            serde_json::json!({
                "host": "a", "port": 2, "maxBufferSize": "5", "tlsOptions": {"ca": "x", "key": "k"}
            })
        );
        let listed: Vec<Transport> = serde_json::from_str(r#"["tcp://a:1", {"transport": 0}]"#).unwrap();
        assert_eq!(listed.len(), 2);
    }

    #[test]
    fn the_environment_lays_options_over_the_url() {
        let variables = [
            ("MARTLET_ORDERS_OPTIONS__MAX_BUFFER_SIZE", "2000"),
            ("MARTLET_ORDERS_OPTIONS__TLS_OPTIONS__CA", "ca.pem"),
            ("MARTLET_ORDERS_URL", "tcp://orders:4000?maxBufferSize=1000&timeout=0"),
            ("MARTLET_ORDERS_EU_URL", "tcp://eu:1"),
            ("PATH", "/bin"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let options = Transport::from_env_vars("orders", variables).unwrap().tcp_client_options().unwrap();
        assert_eq!((options.host.as_str(), options.port), ("orders", 4000));
        assert_eq!(options.max_buffer_size, 2000);
        assert_eq!(options.timeout, Duration::ZERO);
        assert_eq!(options.tls_options.unwrap().ca, martlet::tcp::Pem::new("ca.pem"));
    }

    #[test]
    fn a_wrong_client_is_named() {
        let error = text(Clients::from_json(r#"{"orders":{"options":{"prot":1}}}"#).unwrap_err());
        assert!(
            error.starts_with("client orders: unknown option prot for tcp clients: did you mean port?"),
            "{error}"
        );
        let error = text(Clients::from_json(r#"{"orders":5}"#).unwrap_err());
        assert!(error.starts_with("client orders: "), "{error}");
        Clients::from_json("[]").unwrap_err();
    }

    struct Typed;

    impl ClientName for Typed {
        const NAME: &'static str = "typed";
    }

    #[actix::test]
    async fn clients_declared_together_reach_handlers_by_name_and_type_and_close_with_the_service() {
        let sum = message("sum", async |Data(numbers): Data<Vec<i64>>| {
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        });
        let back = Microservice::new().on_current_arbiter().handlers(sum);
        let back = back.server(TcpServer::bind("127.0.0.1", 0)).start().await.unwrap();

        let config = serde_json::json!({ "named": back.url(), "unused": { "transport": 0 } }).to_string();
        let clients = Clients::from_json(&config).unwrap();
        let clients = clients
            .with_factory("typed", async || Transport::from_url(&back.url())?.into_client())
            .await
            .unwrap();
        assert_eq!(clients.names().collect::<Vec<_>>(), ["named", "typed", "unused"]);
        let failing = Clients::new().with_factory("x", async || Err::<martlet::ClientProxy, _>("no secret"));
        assert_eq!(failing.await.unwrap_err(), "no secret");

        let ask = message("ask", async |request: Request, typed: Client<Typed>| {
            let named = request.client("named").ok_or("no client")?;
            let one: i64 = named.send("sum", [1, 2]).await?;
            let other: i64 = typed.send("sum", [3, 4]).await?;
            Ok::<_, Unexpected>([one, other])
        });
        let front = Microservice::new().on_current_arbiter().handlers(ask).clients(clients.clone());
        let front = front.server(TcpServer::bind("127.0.0.1", 0)).start().await.unwrap();
        let caller = Transport::from_url(&front.url()).unwrap().into_client().unwrap();
        let sums: [i64; 2] = caller.send("ask", ()).await.unwrap();
        assert_eq!(sums, [3, 7]);

        caller.close().await;
        front.stop(Duration::from_secs(5)).await;
        let error = clients.get("named").unwrap().send::<i64>("sum", [1]).await.unwrap_err();
        assert!(matches!(error, CallError::Closed), "{error}");
        back.stop(Duration::from_secs(5)).await;
    }

    #[actix::test]
    async fn a_transport_from_a_file_serves() {
        let file = std::env::temp_dir().join(format!("martlet-config-{}.json", std::process::id()));
        std::fs::write(&file, r#"{"transport":"TCP","options":{"host":"127.0.0.1","port":0}}"#).unwrap();
        let transport = Transport::from_file(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let service = Microservice::new().on_current_arbiter().server(transport.into_server().unwrap());
        let service = service.start().await.unwrap();
        assert!(service.url().starts_with("tcp://127.0.0.1:"), "{}", service.url());
        service.stop(Duration::ZERO).await;
    }
}

/// Both preludes together: a name that both had would be ambiguous here.
#[allow(unused_imports, dead_code)]
mod preludes {
    use actix::prelude::*;
    use martlet::prelude::*;

    struct Counter;

    impl Actor for Counter {
        type Context = Context<Self>;
    }

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Tick;

    impl Handler<Tick> for Counter {
        type Result = ();
        fn handle(&mut self, _: Tick, _: &mut Context<Self>) {}
    }

    struct Name;

    impl ClientName for Name {
        const NAME: &'static str = "name";
    }

    type Ours = (
        CallError,
        Client<Name>,
        ClientProxy,
        Clients,
        Ctx<u8>,
        Data<u8>,
        HandlerGroup,
        Metadata,
        Microservice,
        Pattern,
        RpcError,
        State<u8>,
        Streaming<u8>,
        Transport,
        TryStreaming<u8>,
        Unexpected,
    );

    fn functions() -> (HandlerGroup, HandlerGroup) {
        let handler = async || Ok::<_, RpcError>(1);
        (message(pattern!({ "cmd": "a" }), handler), event("b", handler))
    }
}
