// SPDX-License-Identifier: MIT OR Apache-2.0

// Applies NestJS decorators by hand, so that no TypeScript build is needed.

/** Builds a controller class out of routes: `{ kind, pattern, transport, extras, handle }`, see `routes.mjs`. */
export function buildController(nest, routes) {
  const { Controller } = nest.common;
  const { Ctx, EventPattern, MessagePattern, Payload } = nest.microservices;

  class Peer {}
  routes.forEach(({ kind, pattern, transport, extras, handle }, index) => {
    const name = `route${index}`;
    Object.defineProperty(Peer.prototype, name, { value: handle, writable: true, configurable: true });
    const descriptor = Object.getOwnPropertyDescriptor(Peer.prototype, name);
    Payload()(Peer.prototype, name, 0);
    Ctx()(Peer.prototype, name, 1);
    const decorator = kind === 'message' ? MessagePattern : EventPattern;
    decorator(pattern, transport, extras)(Peer.prototype, name, descriptor);
  });
  Controller()(Peer);
  return Peer;
}

/** A module with these controllers. */
export function buildModule(nest, controllers) {
  class PeerModule {}
  nest.common.Module({ controllers })(PeerModule);
  return PeerModule;
}
