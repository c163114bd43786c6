// SPDX-License-Identifier: MIT OR Apache-2.0

// The NestJS 12 side of the benchmarks, as fast as NestJS goes (production, no logger): a service with {cmd:"sum"}, the event
// noted and the number of these events, counted; or a client that publishes such events.
//
//   node tests/bench/nest/service.mjs tcp [--host 127.0.0.1] [--port 0]
//   node tests/bench/nest/service.mjs nats [--nats nats://127.0.0.1:4222] [--queue Q]
//   node tests/bench/nest/service.mjs redis|rmq|mqtt --url URL [--queue Q]
//   node tests/bench/nest/service.mjs redis|rmq|mqtt --url URL [--queue Q] --publish [--depth 64] [--warmup S] [--seconds S]
//
// A service prints one line "ready <port or transport> <pid>" and serves until SIGTERM comes; then it exits with 0. A publisher
// prints one line of JSON. Both use the packages that tests/interop/setup.sh installs.

import { parseArgs } from 'node:util';

process.env.NODE_ENV = 'production';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    host: { type: 'string', default: '127.0.0.1' },
    port: { type: 'string', default: '0' },
    nats: { type: 'string', default: 'nats://127.0.0.1:4222' },
    queue: { type: 'string' },
    url: { type: 'string' },
    publish: { type: 'boolean', default: false },
    depth: { type: 'string', default: '64' },
    warmup: { type: 'string', default: '0.5' },
    seconds: { type: 'string', default: '5' },
    json: { type: 'boolean' },
  },
});
const transport = positionals[0];
const isBroker = ['redis', 'rmq', 'mqtt'].includes(transport);
if (positionals.length !== 1 || !(['tcp', 'nats'].includes(transport) || (isBroker && values.url))) {
  console.error('usage: node service.mjs tcp [--host H] [--port N] | nats [--nats URL] [--queue Q] | redis|rmq|mqtt --url URL [--queue Q] [--publish]');
  process.exit(2);
}
process.on('SIGTERM', () => process.exit(0));
process.on('SIGINT', () => process.exit(0));

const { nest } = await import('../../interop/nest12/nest.mjs');
const { Controller, Module } = nest.common;
const { ClientProxyFactory, EventPattern, MessagePattern, Transport } = nest.microservices;

const config = {
  tcp: () => ({ transport: Transport.TCP, options: { host: values.host, port: Number(values.port) } }),
  nats: () => ({ transport: Transport.NATS, options: { servers: [values.nats], queue: values.queue } }),
  redis: () => ({ transport: Transport.REDIS, options: { host: new URL(values.url).hostname, port: Number(new URL(values.url).port) } }),
  // What a publisher sends is consumed by nobody.
  rmq: () => ({ transport: Transport.RMQ, options: { urls: [values.url], queue: values.queue, queueOptions: values.publish ? { maxLength: 10_000 } : {} } }),
  mqtt: () => ({ transport: Transport.MQTT, options: { url: values.url } }),
}[transport]();

if (values.publish) {
  await publish();
  process.exit(0);
}

let noted = 0;

// No parameter decorators: NestJS then passes the payload straight on.
class SumController {
  sum(numbers) {
    return (numbers ?? []).reduce((a, b) => a + b);
  }

  noted(numbers) {
    this.sum(numbers);
    noted += 1;
  }

  counted() {
    return noted;
  }
}
const { prototype } = SumController;
const decorate = (decorator, method) => decorator(prototype, method, Object.getOwnPropertyDescriptor(prototype, method));
decorate(MessagePattern({ cmd: 'sum' }), 'sum');
if (isBroker) {
  decorate(EventPattern('noted'), 'noted');
  decorate(MessagePattern('counted'), 'counted');
}
Controller()(SumController);

class SumModule {}
Module({ controllers: [SumController] })(SumModule);

const app = await nest.core.NestFactory.createMicroservice(SumModule, { ...config, logger: false, abortOnError: false });
await app.listen();
const port = transport === 'tcp' ? app.unwrap().address().port : null;
// Ready means that the broker has the subscription.
if (transport === 'nats') await app.unwrap().flush();
// NestJS does not wait for its subscriptions on these.
if (isBroker) await new Promise((resolve) => setTimeout(resolve, 500));
console.log(`ready ${port ?? transport} ${process.pid}`);

/** Keeps `depth` events in flight and prints what that cost. */
async function publish() {
  const client = ClientProxyFactory.create(config);
  await client.connect();
  const { lastValueFrom } = nest.rxjs;
  const now = () => performance.now() / 1000;
  const opens = now() + Number(values.warmup);
  const closes = opens + Number(values.seconds);
  let requests = 0;
  let turn = 0;
  const slot = async () => {
    while (now() < closes) {
      turn += 1;
      await lastValueFrom(client.emit('noted', [(turn % 90) + 10, 2, 3, 4, 5]), { defaultValue: null });
      if (now() >= opens && now() < closes) requests += 1;
    }
  };
  const slots = Array.from({ length: Number(values.depth) }, slot);
  await new Promise((resolve) => setTimeout(resolve, Number(values.warmup) * 1000));
  const [started, before] = [now(), process.cpuUsage()];
  await Promise.all(slots);
  const used = process.cpuUsage(before);
  const seconds = now() - started;
  console.log(JSON.stringify({ requests, failures: {}, seconds, rps: requests / seconds, client_cpu_seconds: (used.user + used.system) / 1e6 }));
}
