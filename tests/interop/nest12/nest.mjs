// SPDX-License-Identifier: MIT OR Apache-2.0

// The NestJS 12 modules, in the shape the shared peer expects. NestJS 12 is ESM and uses the split NATS packages.

import 'reflect-metadata';
import * as common from '@nestjs/common';
import * as core from '@nestjs/core';
import * as microservices from '@nestjs/microservices';
import * as nats from '@nats-io/transport-node';
import * as rxjs from 'rxjs';
import { readFileSync } from 'node:fs';

const manifest = new URL('./node_modules/@nestjs/microservices/package.json', import.meta.url);

export const nest = { major: 12, version: JSON.parse(readFileSync(manifest, 'utf8')).version, common, core, microservices, nats, rxjs };
