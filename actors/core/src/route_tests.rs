// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use super::*;

fn handler(kind: HandlerKind, pattern: impl Into<Pattern>) -> Arc<HandlerRef> {
    Arc::new(HandlerRef {
        info: HandlerInfo::new("test", kind, pattern),
        replicas: Weak::new(),
        endpoint: 0,
        stats: Vec::new(),
    })
}

/// What a table should be, the plain way: routes in order, each with its handlers.
#[derive(Default)]
struct Model(Vec<(Route, Vec<Arc<HandlerRef>>)>);

impl Model {
    fn change(&mut self, removed: &[Arc<HandlerRef>], added: &[Arc<HandlerRef>]) {
        for handler in removed {
            let at = self.0.iter().position(|(route, _)| route == handler.info.pattern.route()).unwrap();
            self.0[at].1.retain(|mine| !Arc::ptr_eq(mine, handler));
            if self.0[at].1.is_empty() {
                self.0.remove(at);
            }
        }
        for handler in added {
            let route = handler.info.pattern.route();
            match self.0.iter_mut().find(|(mine, _)| mine == route) {
                Some((_, handlers)) => handlers.push(Arc::clone(handler)),
                None => self.0.push((route.clone(), vec![Arc::clone(handler)])),
            }
        }
    }

    #[track_caller]
    fn check(&self, table: &RouteTable) {
        let names = |routes: Vec<&Route>| routes.iter().map(ToString::to_string).collect::<Vec<_>>();
        let order = names(table.iter().map(|entry| &entry.route).collect());
        assert_eq!(order, names(self.0.iter().map(|(route, _)| route).collect()));
        assert_eq!((table.len(), table.is_empty()), (self.0.len(), self.0.is_empty()));
        for (route, handlers) in &self.0 {
            let entry = table.get(route).unwrap();
            assert_eq!(table.route_at(entry.index), Some(route));
            let of = |kind| handlers.iter().filter(move |handler| handler.info.kind == kind);
            let message = of(HandlerKind::Message).next();
            assert_eq!(entry.message.as_ref().map(Arc::as_ptr), message.map(Arc::as_ptr));
            let events: Vec<_> = entry.events.iter().map(Arc::as_ptr).collect();
            assert_eq!(events, of(HandlerKind::Event).map(Arc::as_ptr).collect::<Vec<_>>());
            for raw in entry.spellings.iter() {
                assert!(Arc::ptr_eq(table.find(Format::Json, raw).unwrap(), entry), "{route}");
            }
        }
    }
}

/// The same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

#[test]
fn a_changed_table_is_the_one_that_would_be_built_anew() {
    let mut numbers = Numbers(1);
    for routes in [3, 40, 300] {
        let (mut table, mut model) = (RouteTable::default(), Model::default());
        let mut registered: Vec<Vec<Arc<HandlerRef>>> = Vec::new();
        let (mut rebuilt, mut layered) = (0, 0);
        for _ in 0..1500 {
            let before = Arc::clone(&table.bulk);
            if !registered.is_empty() && numbers.below(2) == 0 {
                let group = registered.swap_remove(numbers.below(registered.len()));
                table = table.changed(&group, []);
                model.change(&group, &[]);
            } else {
                let mut group: Vec<Arc<HandlerRef>> = Vec::new();
                for _ in 0..=numbers.below(4) {
                    let number = numbers.below(routes);
                    let pattern = match number % 3 {
                        0 => Pattern::from(format!("route.{number}")),
                        1 => Pattern::parse(&format!(r#"{{"n":{number},"cmd":"x"}}"#)),
                        _ => Pattern::from(number as i64),
                    };
                    let has_message = |handlers: &[Arc<HandlerRef>]| {
                        let mut messages = handlers.iter().filter(|it| it.info.kind == HandlerKind::Message);
                        messages.any(|it| it.info.pattern.route() == pattern.route())
                    };
                    let taken = has_message(&group) || registered.iter().any(|group| has_message(group));
                    let kind = if taken { HandlerKind::Event } else { HandlerKind::Message };
                    group.push(handler(kind, pattern));
                }
                table = table.changed([], &group);
                model.change(&[], &group);
                registered.push(group);
            }
            match Arc::ptr_eq(&before, &table.bulk) {
                true => layered += 1,
                false => rebuilt += 1,
            }
            model.check(&table);
        }
        assert!(rebuilt > 10 && layered > 100, "{routes}: {rebuilt} rebuilt, {layered} not");
    }
}

#[test]
fn what_is_gone_is_not_found_and_what_comes_back_is() {
    let keep: Vec<_> = (0..100).map(|n| handler(HandlerKind::Message, format!("keep.{n}"))).collect();
    let sum = handler(HandlerKind::Message, Pattern::parse(r#"{"cmd":"sum"}"#));
    let table = RouteTable::default().changed([], keep.iter().chain([&sum]));
    // The first is as it is usually sent; the others are normalised.
    let spelled = [&br#"{"cmd":"sum"}"#[..], br#" { "cmd" : "sum" } "#, br#""{\"cmd\":\"sum\"}""#];
    let found = |table: &RouteTable| spelled.map(|raw| table.find(Format::Json, raw).is_some());
    assert_eq!(found(&table), [true; 3]);
    let gone = table.changed([&sum], []);
    assert!(Arc::ptr_eq(&gone.bulk, &table.bulk), "this is about what lies over");
    assert_eq!((found(&gone), gone.len()), ([false; 3], 100));
    let again = handler(HandlerKind::Message, Pattern::parse(r#"{"cmd":"sum"}"#));
    let back = gone.changed([], [&again]);
    assert_eq!((found(&back), back.len()), ([true; 3], 101));
    assert!(Arc::ptr_eq(back.find(Format::Json, spelled[0]).unwrap().message.as_ref().unwrap(), &again));
    // The old table is what it was.
    assert_eq!((found(&table), table.len()), ([true; 3], 101));
}

#[test]
fn changes_are_told_between_any_two_tables() {
    let all: Vec<_> = (0..1000).map(|n| handler(HandlerKind::Event, format!("r.{n}"))).collect();
    let mut tables = vec![RouteTable::default().changed([], &all)];
    for (n, old) in all.iter().enumerate().take(200) {
        let new = handler(HandlerKind::Event, format!("new.{n}"));
        let next = tables.last().unwrap().changed([old], [&new]);
        tables.push(next);
    }
    let far = tables.len() - 1;
    assert!(!Arc::ptr_eq(&tables[0].bulk, &tables[far].bulk));
    for (earlier, later) in [(0, 1), (3, 9), (0, far), (far - 1, far), (5, 5), (9, 3)] {
        let told = tables[later].changed_since(&tables[earlier]);
        let has = |table: usize, route: &Route| tables[table].get(route).is_some();
        let routes = tables[earlier].iter().chain(tables[later].iter()).map(|entry| &entry.route);
        for route in routes.filter(|route| has(earlier, route) != has(later, route)) {
            assert!(told.contains(route), "{earlier} to {later}: {route}");
        }
    }
    // Few are told where few have changed.
    assert_eq!(tables[1].changed_since(&tables[0]).len(), 2);
}

/// Counted, not timed: the entries that are put into some map or list by changing one route at a time.
#[test]
fn a_change_costs_the_root_of_the_number_of_routes() {
    const ROUTES: usize = 100_000;
    const CHANGES: usize = 2_000;
    let all: Vec<_> = (0..ROUTES).map(|n| handler(HandlerKind::Message, format!("route.{n}"))).collect();
    let mut table = RouteTable::default().changed([], &all);
    assert_eq!(table.recent.size(), 0, "nothing lies over the first table");
    let mut put = 0;
    for (n, old) in all.iter().enumerate().take(CHANGES) {
        let before = Arc::clone(&table.bulk);
        table = match n % 2 {
            0 => table.changed([old], []),
            _ => table.changed([], [&handler(HandlerKind::Message, format!("new.{n}"))]),
        };
        let over = |recent: &Recent| recent.routes.len() + recent.spellings.len() + recent.order.len();
        put += over(&table.recent);
        if !Arc::ptr_eq(&before, &table.bulk) {
            let bulk = &table.bulk;
            put += bulk.routes.len() + bulk.spellings.len() + bulk.order.len();
        }
        assert_eq!(table.len(), ROUTES - (n / 2 + 1) + n.div_ceil(2));
    }
    let each = put / CHANGES;
    let anew = table.bulk.routes.len() + table.bulk.spellings.len() + table.bulk.order.len();
    // About 1,200 against 300,000.
    assert!(each < 10 * ROUTES.isqrt(), "{each} for each change");
    assert!(each * 100 < anew, "{each} for each change, {anew} to build anew");
}
