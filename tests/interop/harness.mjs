// SPDX-License-Identifier: MIT OR Apache-2.0

// Starts peers and brokers for the self-check and makes sure that none of them survives it.

import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
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

/** A nats-server on a free port, which can be stopped and started again on the same port. */
export class Broker {
  static async start(port = -1) {
    const broker = new Broker();
    const directory = mkdtempSync(join(tmpdir(), 'interop-nats-'));
    try {
      const args = ['-a', '127.0.0.1', '-p', String(port), '--ports_file_dir', directory];
      // Debian installs it where not every user's PATH looks.
      const env = { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` };
      broker.child = spawn('nats-server', args, { stdio: 'ignore', env });
      running.add(broker.child);
      let failure;
      broker.child.on('error', (error) => (failure = `nats-server: ${error.message}; run tests/interop/setup.sh`));
      broker.exited = new Promise((resolve) => broker.child.on('close', resolve));
      void broker.exited.then((code) => {
        running.delete(broker.child);
        failure ??= `nats-server ended with ${code}`;
      });
      broker.url = await eventually('nats-server to say its port', () => {
        if (failure !== undefined) throw new Error(failure);
        const file = readdirSync(directory).find((name) => name.endsWith('.ports'));
        return file && JSON.parse(readFileSync(join(directory, file), 'utf8')).nats[0];
      });
      broker.port = Number(new URL(broker.url).port);
      return broker;
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  }

  async stop() {
    this.child.kill('SIGKILL');
    await this.exited;
  }
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
