// SPDX-License-Identifier: MIT OR Apache-2.0

// The control channel: commands in as JSON lines on stdin, results and reports out as JSON lines on stdout.

import { createInterface } from 'node:readline';
import { writeSync } from 'node:fs';

export class Control {
  /** Counters of everything that must stay at zero for an undisturbed peer. */
  disturbances = { exceptions: 0, rejections: 0, errors: 0, warnings: 0 };
  statuses = [];
  #leaving = false;
  #answerLine;
  #early = [];
  #stop = () => process.exit(0);

  /** Watches the process and its stdin from the start, so that a peer that is still starting never outlives its parent. */
  constructor() {
    const input = createInterface({ input: process.stdin, crlfDelay: Infinity });
    input.on('line', (line) => (this.#answerLine ? this.#answerLine(line) : this.#early.push(line)));
    input.on('close', () => process.exit(0));
    process.on('SIGTERM', () => this.#stop());
    process.on('SIGINT', () => this.#stop());
    process.on('uncaughtException', (error) => this.#uncaught('exceptions', error));
    process.on('unhandledRejection', (error) => this.#uncaught('rejections', error));
  }

  print(line) {
    let rest = Buffer.from(`${JSON.stringify(line)}\n`);
    while (rest.length > 0) {
      try {
        rest = rest.subarray(writeSync(1, rest));
      } catch (error) {
        if (error.code === 'EPIPE') process.exit(0);
        if (error.code !== 'EAGAIN') throw error;
      }
    }
  }

  /** A NestJS logger that reports errors and warnings and swallows the rest. */
  logger() {
    const report = (level, counter) => (message, ...rest) => {
      this.disturbances[counter] += 1;
      const context = rest.filter((part) => typeof part === 'string').at(-1) ?? null;
      this.print({ event: 'log', level, context, message: plainText(message) });
    };
    const silent = () => {};
    const [error, warn] = [report('error', 'errors'), report('warn', 'warnings')];
    return { log: silent, debug: silent, verbose: silent, error, fatal: error, warn };
  }

  /** Follows the `status` stream of a NestJS client or server. NestJS 10 has none. */
  followStatus(target) {
    this.hasStatus = target.status !== undefined;
    target.status?.subscribe((status) => {
      this.statuses.push(status);
      this.print({ event: 'status', status });
    });
  }

  /**
   * Answers commands until the parent closes stdin or sends SIGTERM; the process then ends with 0 whatever is pending.
   * `commands` maps a command name to a function of the command line. `close` is tried on SIGTERM for `graceMs` at most.
   */
  serve(commands, close, graceMs) {
    const all = {
      status: () => ({ supported: this.hasStatus, history: this.statuses, current: this.statuses.at(-1) ?? null }),
      ping: () => ({}),
      exit: ({ code = 0 }) => process.exit(code),
      ...commands,
    };
    this.#stop = () => {
      if (this.#leaving) return;
      this.#leaving = true;
      setTimeout(() => process.exit(0), graceMs);
      Promise.resolve()
        .then(close)
        .catch((error) => this.print({ event: 'closeFailed', error: this.describeError(error) }))
        .finally(() => process.exit(0));
    };
    this.#answerLine = (line) => void this.#answer(all, line);
    this.#early.forEach(this.#answerLine);
  }

  /** How an error looks in a result: what crossed the wire as it is, an `Error` as `{"$error": class, "message"}`. */
  describeError(error) {
    if (error === undefined) return { $undefined: true };
    if (!(error instanceof Error)) return error;
    const code = error.code === undefined ? {} : { code: error.code };
    const inner = typeof error.getError === 'function' ? { error: error.getError() } : {};
    return { $error: error.constructor.name, message: error.message, ...code, ...inner };
  }

  async #answer(commands, line) {
    if (line.trim() === '') return;
    let command;
    try {
      command = JSON.parse(line);
    } catch (error) {
      return this.print({ id: null, error: { $error: 'Command', message: `not JSON: ${error.message}` } });
    }
    const id = command?.id ?? null;
    const run = Object.hasOwn(commands, command?.cmd ?? '') ? commands[command.cmd] : undefined;
    if (run === undefined) {
      const known = Object.keys(commands).join(', ');
      return this.print({ id, error: { $error: 'Command', message: `unknown cmd ${JSON.stringify(command?.cmd)}; known: ${known}` } });
    }
    try {
      this.print({ id, error: null, ...(await run(command)) });
    } catch (error) {
      this.print({ id, error: this.describeError(error) });
    }
  }

  #uncaught(counter, error) {
    this.disturbances[counter] += 1;
    const kind = counter === 'exceptions' ? 'exception' : 'rejection';
    this.print({ event: 'uncaught', kind, message: plainText(error) });
  }
}

/** JSON has no `undefined`: a result shows it as `{"$undefined": true}`. */
export function visible(value) {
  return value === undefined ? { $undefined: true } : value;
}

function plainText(value) {
  if (value instanceof Error) return value.stack ?? value.message;
  if (typeof value === 'string') return value;
  try {
    return JSON.stringify(value) ?? String(value);
  } catch {
    return String(value);
  }
}
