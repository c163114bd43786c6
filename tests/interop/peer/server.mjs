// SPDX-License-Identifier: MIT OR Apache-2.0

// The server peer: a NestJS microservice over one transport.

import { buildController, buildModule } from './controller.mjs';
import { buildRoutes } from './routes.mjs';
import { transportOptions, transports } from './transports.mjs';

export async function runServer(nest, flags, control) {
  const { NestFactory } = nest.core;
  const { ClientProxyFactory } = nest.microservices;
  const state = {
    calls: {},
    notifications: 0,
    lastNotification: undefined,
    slowRunning: 0,
    infiniteActive: 0,
    stopInfinite: new nest.rxjs.Subject(),
    subjects: [],
  };
  const config = transportOptions(nest, flags);
  let port = null;
  let selfClient;
  const self = async () => {
    if (selfClient === undefined) {
      const { transport, options } = transportOptions(nest, { ...flags, port, options: clientSide(flags.options) });
      selfClient = ClientProxyFactory.create({ transport, options });
      await selfClient.connect();
      // Its calls start together: see "The reply address" in README.md.
      await transports[flags.transport].hold?.(selfClient, '{"cmd":"sum"}');
    }
    return selfClient;
  };

  const routes = buildRoutes(nest, state, { flags, self });
  const root = buildModule(nest, [buildController(nest, routes)]);
  const app = await NestFactory.createMicroservice(root, { ...config, logger: control.logger(), abortOnError: false });
  const server = app.serverInstance ?? app.server;
  // NestJS 10 reads port 0 as "the default port".
  if (flags.transport === 'tcp') server.port = config.options.port;
  control.followStatus(app);
  await app.listen();
  if (flags.transport === 'tcp') port = server.server.address().port;
  // NestJS does not wait until the broker has read the subscriptions; ready means that it has.
  await transports[flags.transport].ready?.(server);

  const close = async () => {
    await selfClient?.close();
    await app.close();
  };
  const grace = config.options.gracefulShutdown ? (config.options.gracePeriod ?? 10_000) : 0;
  control.print({ ready: true, role: 'server', nest: nest.version, transport: flags.transport, port, pid: process.pid });
  control.serve(
    {
      close: async () => {
        await close();
        return { closed: true };
      },
      stopInfinite: () => {
        state.stopInfinite.next();
        return { infiniteActive: state.infiniteActive };
      },
      stats: () => ({
        ...control.disturbances,
        calls: state.calls,
        notifications: state.notifications,
        slowRunning: state.slowRunning,
        infiniteActive: state.infiniteActive,
        rssBytes: process.memoryUsage.rss(),
      }),
    },
    close,
    grace + 1_000,
  );
}

/** The service calls itself without what is for servers alone; a TLS key pair is trusted as its own authority. */
function clientSide({ queue, tlsOptions, noAck, ...rest }) {
  if (tlsOptions === undefined) return rest;
  return { ...rest, tlsOptions: { ...tlsOptions, ca: tlsOptions.ca ?? tlsOptions.cert } };
}
