// SPDX-License-Identifier: MIT OR Apache-2.0

// Entry of every peer: reads the arguments, watches the process, and starts the server or the client.

import { parseArgs } from 'node:util';
import { runClient } from './client.mjs';
import { Control } from './control.mjs';
import { runServer } from './server.mjs';
import { transports } from './transports.mjs';

const USAGE = `usage: node peer.mjs server|client --transport tcp|nats|redis|rmq|mqtt|mqtt5 [options]

  --transport NAME      which NestJS transport to use (required); mqtt5 is mqtt with protocolVersion 5
  --url URL             where the broker is; tcp: where to listen or to connect, port 0 lets the system choose
                        (server only) [tcp://127.0.0.1:0, nats://127.0.0.1:4222, redis://127.0.0.1:6379,
                        amqp://127.0.0.1:5672, mqtt://127.0.0.1:1883]
  --queue Q             nats server: queue group of every subscription; rmq: the queue
  --name NAME           server: what the handlers "whoami" and "queued" answer [the process id]
  --options JSON        any further NestJS options of the transport, laid over the ones above; may be repeated
  --wrap-errors         client: use a client class that turns every remote error into an RpcException
  --sabotage            server: {cmd:"sum"} is off by one, to prove that a check notices`;

/** Runs a peer with the modules of one NestJS major version. */
export async function main(nest, argv) {
  const { role, flags } = readArguments(argv);
  const control = new Control();
  try {
    await (role === 'server' ? runServer : runClient)(nest, flags, control);
  } catch (error) {
    control.print({ ready: false, error: control.describeError(error) });
    process.exit(1);
  }
}

function readArguments(argv) {
  try {
    const { positionals, values } = parseArgs({
      args: argv,
      allowPositionals: true,
      options: {
        transport: { type: 'string' },
        url: { type: 'string' },
        queue: { type: 'string' },
        name: { type: 'string', default: String(process.pid) },
        options: { type: 'string', multiple: true, default: [] },
        'wrap-errors': { type: 'boolean', default: false },
        sabotage: { type: 'boolean', default: false },
      },
    });
    const role = positionals[0];
    if (positionals.length !== 1 || !['server', 'client'].includes(role)) throw new Error('say server or client');
    const version5 = values.transport === 'mqtt5';
    const transport = version5 ? 'mqtt' : values.transport;
    if (!Object.hasOwn(transports, transport)) throw new Error('--transport must be tcp, nats, redis, rmq, mqtt or mqtt5');
    const url = values.url ?? transports[transport].url;
    const { hostname: host, port: digits } = new URL(url);
    const port = Number(digits);
    if (role === 'client' && transport === 'tcp' && port === 0) throw new Error('a tcp client needs a port in --url');
    const options = Object.assign({}, ...values.options.map((text) => JSON.parse(text)));
    return { role, flags: { ...values, transport, version5, url, host, port, options } };
  } catch (error) {
    console.error(`${error.message}\n\n${USAGE}`);
    process.exit(2);
  }
}
