// SPDX-License-Identifier: MIT OR Apache-2.0

// The NestJS 12 side of the benchmarks: a service with only {cmd:"sum"}, as fast as NestJS goes (production, no logger).
//
//   node tests/bench/nest/service.mjs tcp [--host 127.0.0.1] [--port 0]
//   node tests/bench/nest/service.mjs nats [--nats nats://127.0.0.1:4222] [--queue Q]
//
// Prints one line "ready <port or nats> <pid>" and serves until SIGTERM comes; then it exits with 0. It uses the packages that tests/interop/setup.sh installs.

import { parseArgs } from 'node:util';

process.env.NODE_ENV = 'production';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    host: { type: 'string', default: '127.0.0.1' },
    port: { type: 'string', default: '0' },
    nats: { type: 'string', default: 'nats://127.0.0.1:4222' },
    queue: { type: 'string' },
  },
});
const transport = positionals[0];
if (positionals.length !== 1 || !['tcp', 'nats'].includes(transport)) {
  console.error('usage: node service.mjs tcp [--host H] [--port N] | nats [--nats URL] [--queue Q]');
  process.exit(2);
}
process.on('SIGTERM', () => process.exit(0));
process.on('SIGINT', () => process.exit(0));

const { nest } = await import('../../interop/nest12/nest.mjs');
const { Controller, Module } = nest.common;
const { MessagePattern, Transport } = nest.microservices;

// No parameter decorators: NestJS then passes the payload straight on.
class SumController {
  sum(numbers) {
    return (numbers ?? []).reduce((a, b) => a + b);
  }
}
const { prototype } = SumController;
MessagePattern({ cmd: 'sum' })(prototype, 'sum', Object.getOwnPropertyDescriptor(prototype, 'sum'));
Controller()(SumController);

class SumModule {}
Module({ controllers: [SumController] })(SumModule);

const config =
  transport === 'tcp'
    ? { transport: Transport.TCP, options: { host: values.host, port: Number(values.port) } }
    : { transport: Transport.NATS, options: { servers: [values.nats], queue: values.queue } };

const app = await nest.core.NestFactory.createMicroservice(SumModule, { ...config, logger: false, abortOnError: false });
await app.listen();
const port = transport === 'tcp' ? app.unwrap().address().port : null;
// Ready means that the broker has the subscription.
if (transport === 'nats') await app.unwrap().flush();
console.log(`ready ${port ?? 'nats'} ${process.pid}`);
