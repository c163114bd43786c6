// SPDX-License-Identifier: MIT OR Apache-2.0

// What differs between the transports, one entry each; everything else in the peers is the same for all of them.

/** How a transport's subscriptions are written: `wild('time', ONE)`. */
const dots = (one, rest) => ({ separator: '.', one, rest });

/**
 * `id`: NestJS's name. `url`: where it is by default. `options`: NestJS's options for the flags. `topics`: how wildcards look.
 * `ready`: resolves when the broker has all subscriptions of a server. `hold`: keeps the replies to a route subscribed.
 * `pending`: calls that the client waits for. `record`: data with headers or options. `headers`, `delivery`: what a handler
 * sees of them. `raw`: publishes bytes as they are; `listen`: hands on what arrives at a reply address.
 */
export const transports = {
  tcp: {
    id: 'TCP',
    url: 'tcp://127.0.0.1:0',
    options: ({ host, port }) => ({ host, port }),
    pending: (client) => client.routingMap.size,
  },

  nats: {
    id: 'NATS',
    url: 'nats://127.0.0.1:4222',
    topics: dots('*', '>'),
    options: ({ url, queue }) => ({ servers: [url], ...(queue === undefined ? {} : { queue }) }),
    ready: (server) => server.natsClient.flush(),
    pending: (client) => client.routingMap.size,
    record: (nest, data, headers) => {
      const native = nest.nats.headers();
      for (const [key, values] of Object.entries(headers)) {
        for (const value of [].concat(values)) native.append(key, value);
      }
      return new nest.microservices.NatsRecordBuilder(data).setHeaders(native).build();
    },
    headers: (ctx) => {
      const headers = ctx.getHeaders();
      return headers && Object.fromEntries([...headers.keys()].map((key) => [key, headers.values(key)]));
    },
    raw: (client, { address }, bytes) => client.natsClient.publish(address, bytes),
  },

  redis: {
    id: 'REDIS',
    url: 'redis://127.0.0.1:6379',
    topics: dots('*', '*'),
    options: ({ url }) => ({ host: new URL(url).hostname, port: Number(new URL(url).port || 6379) }),
    // Commands of one connection are answered in their order.
    ready: (server) => server.subClient.ping(),
    pending: (client) => client.routingMap.size,
    hold: async (client, route) => {
      await client.connect();
      await client.subClient.subscribe(`${route}.reply`);
      raise(client, `${route}.reply`);
    },
    raw: (client, { address }, bytes) => client.pubClient.publish(address, bytes),
    listen: async (client, { address }, deliver) => {
      client.subClient.on('messageBuffer', (channel, bytes) => channel.toString() === address && deliver(bytes));
      await client.subClient.subscribe(address);
    },
  },

  rmq: {
    id: 'RMQ',
    url: 'amqp://127.0.0.1:5672',
    topics: dots('*', '#'),
    options: ({ url, queue }) => ({ urls: [url], ...(queue === undefined ? {} : { queue }) }),
    pending: (client) => client.responseEmitter?.eventNames().length ?? 0,
    record: (nest, data, headers, options) =>
      new nest.microservices.RmqRecordBuilder(data).setOptions({ ...(headers && { headers }), ...options }).build(),
    headers: (ctx) => lists(ctx.getMessage().properties.headers),
    delivery: (ctx) => {
      const { fields, properties } = ctx.getMessage();
      const { headers, correlationId, replyTo, ...rest } = properties;
      const { exchange, routingKey, redelivered } = fields;
      return { exchange, routingKey, redelivered, ...rest };
    },
    raw: (client, { address, exchange, properties }, bytes) =>
      exchange === undefined
        ? client.channel.sendToQueue(address, bytes, properties)
        : client.channel.publish(exchange, address, bytes, properties),
    // The address is the correlation id.
    listen: async (client, { address }, deliver) => client.responseEmitter.on(address, ({ content }) => deliver(content)),
  },

  mqtt: {
    id: 'MQTT',
    url: 'mqtt://127.0.0.1:1883',
    topics: { separator: '/', one: '+', rest: '#' },
    options: ({ url, version5 }) => ({ url, ...(version5 && { protocolVersion: 5 }) }),
    ready: (server) => server.mqttClient.subscribeAsync('lab/ready'),
    pending: (client) => client.routingMap.size,
    hold: async (client, route) => {
      await client.connect();
      await client.mqttClient.subscribeAsync(`${route}/reply`);
      raise(client, `${route}/reply`);
    },
    record: (nest, data, headers, options = {}) => {
      const properties = { ...options.properties, ...(headers && { userProperties: headers }) };
      const build = new nest.microservices.MqttRecordBuilder(data);
      if (Object.keys(properties).length > 0) build.setProperties(properties);
      if (options.qos !== undefined) build.setQoS(options.qos);
      if (options.retain !== undefined) build.setRetain(options.retain);
      if (options.dup !== undefined) build.setDup(options.dup);
      return build.build();
    },
    headers: (ctx) => lists(ctx.getPacket().properties?.userProperties),
    delivery: (ctx) => {
      const { qos, retain, dup, properties } = ctx.getPacket();
      return { qos, retain, dup, properties: properties && { ...properties } };
    },
    raw: (client, { address, properties }, bytes) => client.mqttClient.publishAsync(address, bytes, properties),
    listen: async (client, { address }, deliver) => {
      client.mqttClient.on('message', (topic, bytes) => topic === address && deliver(bytes));
      await client.mqttClient.subscribeAsync(address);
    },
  },
};

/** The options object NestJS gets for the chosen transport. */
export function transportOptions(nest, flags) {
  const { id, options } = transports[flags.transport];
  return { transport: nest.microservices.Transport[id], options: { ...options(flags), ...flags.options } };
}

/** Whether handlers with wildcards are reached: always on NATS and MQTT, by an option on Redis and RabbitMQ. */
export function hasWildcards(flags) {
  return ['nats', 'mqtt'].includes(flags.transport) || flags.options.wildcards === true;
}

/** NestJS counts the calls that wait on a reply address; one more, and it is never unsubscribed. */
function raise(client, address) {
  client.subscriptionsCount.set(address, (client.subscriptionsCount.get(address) || 0) + 1);
}

/** `{name: value or values}` as `{name: [values]}`. */
function lists(headers) {
  return headers && Object.fromEntries(Object.entries(headers).map(([name, values]) => [name, [].concat(values)]));
}
