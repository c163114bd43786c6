// SPDX-License-Identifier: MIT OR Apache-2.0

// Starts peers and brokers for the self-check and makes sure that none of them survives it.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const START_MS = 20_000;
const running = new Set();
process.on('exit', () => running.forEach((child) => child.kill('SIGKILL')));
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

/** One peer process: `call` sends a command and gives its result, `reports` holds every unsolicited line. */
export class Peer {
  reports = [];
  #results = new Map();
  #serial = 0;

  static async start(version, role, args) {
    const peer = new Peer();
    const script = fileURLToPath(new URL(`./nest${version}/peer.mjs`, import.meta.url));
    peer.version = version;
    peer.child = spawn(process.execPath, [script, role, ...args], { stdio: ['pipe', 'pipe', 'pipe'] });
    running.add(peer.child);
    peer.stderr = '';
    peer.child.stderr.on('data', (text) => (peer.stderr += text));
    // 'close' and not 'exit': the last lines must have been read.
    peer.exited = new Promise((resolve) =>
      peer.child.on('close', (code, signal) => {
        running.delete(peer.child);
        const gone = new Error(`nest${version} ${role} ended with ${signal ?? code}: ${peer.stderr}`);
        peer.#results.forEach(({ reject }) => reject(gone));
        peer.#results.clear();
        resolve(signal ?? code);
      }),
    );
    peer.child.stdin.on('error', () => {});
    const ready = new Promise((resolve) => {
      createInterface({ input: peer.child.stdout }).on('line', (line) => {
        const message = JSON.parse(line);
        if ('ready' in message) resolve(message);
        else if ('id' in message) peer.#settle(message);
        else peer.reports.push(message);
      });
    });
    const gone = peer.exited.then((code) => ({ ready: false, error: `ended with ${code}: ${peer.stderr}` }));
    peer.ready = await within(START_MS, `nest${version} ${role} ready`, Promise.race([ready, gone]));
    if (!peer.ready.ready) throw new Error(`nest${version} ${role} did not start: ${JSON.stringify(peer.ready.error)}`);
    return peer;
  }

  call(command) {
    const id = ++this.#serial;
    const answer = new Promise((resolve, reject) => this.#results.set(id, { resolve, reject }));
    this.raw(JSON.stringify({ id, ...command }));
    return within(30_000, `answer to ${JSON.stringify(command).slice(0, 200)}`, answer);
  }

  send(pattern, data, more = {}) {
    return this.call({ cmd: 'send', pattern, data, ...more });
  }

  emit(pattern, data, more = {}) {
    return this.call({ cmd: 'emit', pattern, data, ...more });
  }

  raw(line) {
    this.child.stdin.write(`${line}\n`);
  }

  /** Closes stdin, as a parent that goes away does; gives the exit code. */
  async stop() {
    this.child.stdin.end();
    return within(5_000, 'exit after stdin was closed', this.exited);
  }

  #settle(message) {
    const waiting = this.#results.get(message.id);
    if (waiting === undefined) return this.reports.push(message);
    this.#results.delete(message.id);
    waiting.resolve(message);
  }
}

/** How each broker is started: its program, arguments and environment for a port and an empty folder of its own. */
const BROKERS = {
  nats: { scheme: 'nats', program: 'nats-server', args: (port) => ['-a', '127.0.0.1', '-p', port] },
  redis: {
    scheme: 'redis',
    program: 'redis-server',
    args: (port, folder) => ['--bind', '127.0.0.1', '--port', port, '--dir', folder, '--save', '', '--appendonly', 'no'],
  },
  mqtt: {
    scheme: 'mqtt',
    program: 'mosquitto',
    // Without nodelay each call takes 45 ms: Nagle's algorithm waits for delayed acknowledgements.
    files: (port) => ({
      'mosquitto.conf': `listener ${port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence false\nlog_dest none\n`,
    }),
    args: (_, folder) => ['-c', join(folder, 'mosquitto.conf')],
  },
  rmq: {
    scheme: 'amqp',
    // The program of this name on the PATH is a wrapper that wants to be root and changes the user.
    program: '/usr/lib/rabbitmq/bin/rabbitmq-server',
    files: () => ({ plugins: '[].' }),
    args: () => [],
    /** Erlang starts an epmd that outlives it, unless there is one already. */
    before: async () => {
      const [epmd, distribution] = [await freePort(), await freePort()];
      const child = spawn('epmd', ['-port', epmd], { stdio: 'ignore' });
      return { child, ready: epmd, env: { ERL_EPMD_PORT: epmd, RABBITMQ_DIST_PORT: distribution } };
    },
    env: (port, folder) => ({
      HOME: folder,
      RABBITMQ_NODENAME: `interop-${port}@localhost`,
      RABBITMQ_NODE_IP_ADDRESS: '127.0.0.1',
      RABBITMQ_NODE_PORT: port,
      RABBITMQ_MNESIA_BASE: join(folder, 'data'),
      RABBITMQ_LOG_BASE: join(folder, 'log'),
      RABBITMQ_ENABLED_PLUGINS_FILE: join(folder, 'plugins'),
      // The process started is then the one that serves: it can be killed.
      RUNNING_UNDER_SYSTEMD: '1',
    }),
  },
};

/** A broker on a free port, which can be stopped and started again on the same port. */
export class Broker {
  children = [];

  static async start(kind, port) {
    const broker = new Broker();
    const { scheme, program, args, files = () => ({}), env = () => ({}), before } = BROKERS[kind];
    const folder = mkdtempSync(join(tmpdir(), `interop-${kind}-`));
    broker.folder = folder;
    broker.port = port ?? Number(await freePort());
    broker.url = `${scheme}://127.0.0.1:${broker.port}`;
    const text = String(broker.port);
    try {
      for (const [name, content] of Object.entries(files(text, folder))) writeFileSync(join(folder, name), content);
      const environment = { ...env(text, folder) };
      if (before !== undefined) {
        const first = await before();
        broker.#watch('epmd', first.child);
        Object.assign(environment, first.env);
        await broker.#accepts('epmd', first.ready);
      }
      // Debian installs it where not every user's PATH looks.
      const path = { PATH: `${process.env.PATH}:/usr/sbin` };
      const child = spawn(program, args(text, folder), { stdio: 'ignore', cwd: folder, env: { ...process.env, ...path, ...environment } });
      broker.#watch(program, child);
      await broker.#accepts(program, text);
      return broker;
    } catch (error) {
      await broker.stop();
      throw error;
    }
  }

  #watch(program, child) {
    running.add(child);
    child.on('error', (error) => (this.failure = `${program}: ${error.message}; run tests/interop/setup.sh`));
    const gone = new Promise((resolve) => {
      const over = (code) => (running.delete(child), (this.failure ??= `${program} ended with ${code}`), resolve());
      child.on('close', over);
      child.on('error', over);
    });
    this.children.push({ child, gone });
  }

  /** Waits until something accepts connections on the port. RabbitMQ takes its time. */
  #accepts(program, port) {
    return eventually(
      `${program} on port ${port}`,
      () => {
        if (this.failure !== undefined) throw new Error(this.failure);
        return new Promise((resolve) => {
          const socket = connect(Number(port), '127.0.0.1', () => (socket.destroy(), resolve(true)));
          socket.on('error', () => resolve(false));
        });
      },
      60_000,
    );
  }

  async stop() {
    for (const { child, gone } of this.children.reverse()) {
      child.kill('SIGKILL');
      await gone;
    }
    this.children = [];
    rmSync(this.folder, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** A port that is free now, as text. */
async function freePort() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  return String(port);
}

/** Polls until `probe` gives something truthy; errors thrown by it are final. */
export async function eventually(what, probe, ms = 10_000) {
  for (const end = Date.now() + ms; ; ) {
    const value = await probe();
    if (value) return value;
    if (Date.now() > end) throw new Error(`waited ${ms} ms in vain for ${what}`);
    await new Promise((done) => setTimeout(done, 20));
  }
}

export function within(ms, what, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no ${what} within ${ms} ms`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
