// SPDX-License-Identifier: MIT OR Apache-2.0

// Entry of every peer: reads the arguments, watches the process, and starts the server or the client.

import { parseArgs } from 'node:util';
import { runClient } from './client.mjs';
import { Control } from './control.mjs';
import { runServer } from './server.mjs';

const USAGE = `usage: node peer.mjs server|client --transport tcp|nats [options]

  --transport tcp|nats  which NestJS transport to use (required)
  --host HOST           tcp: address to listen on or to connect to [127.0.0.1]
  --port N              tcp: port; 0 lets the system choose (server only) [0]
  --nats URL            nats: server URL [nats://127.0.0.1:4222]
  --queue Q             nats server: queue group of every subscription
  --name NAME           server: what the handlers "whoami" and "queued" answer [the process id]
  --options JSON        any further NestJS options of the transport, laid over the ones above
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
        host: { type: 'string', default: '127.0.0.1' },
        port: { type: 'string', default: '0' },
        nats: { type: 'string', default: 'nats://127.0.0.1:4222' },
        queue: { type: 'string' },
        name: { type: 'string', default: String(process.pid) },
        options: { type: 'string', default: '{}' },
        'wrap-errors': { type: 'boolean', default: false },
        sabotage: { type: 'boolean', default: false },
      },
    });
    const role = positionals[0];
    if (positionals.length !== 1 || !['server', 'client'].includes(role)) throw new Error('say server or client');
    if (!['tcp', 'nats'].includes(values.transport)) throw new Error('--transport must be tcp or nats');
    const port = Number(values.port);
    if (!Number.isInteger(port) || port < 0 || port > 65535) throw new Error('--port must be 0 to 65535');
    if (role === 'client' && values.transport === 'tcp' && port === 0) throw new Error('a tcp client needs --port');
    return { role, flags: { ...values, port, options: JSON.parse(values.options) } };
  } catch (error) {
    console.error(`${error.message}\n\n${USAGE}`);
    process.exit(2);
  }
}

/** The options object NestJS gets for the chosen transport. */
export function transportOptions(nest, flags) {
  const { Transport } = nest.microservices;
  if (flags.transport === 'tcp') {
    return { transport: Transport.TCP, options: { host: flags.host, port: flags.port, ...flags.options } };
  }
  const queue = flags.queue === undefined ? {} : { queue: flags.queue };
  return { transport: Transport.NATS, options: { servers: [flags.nats], ...queue, ...flags.options } };
}
