// SPDX-License-Identifier: MIT OR Apache-2.0

// The NestJS 11 modules, in the shape the shared peer expects. NestJS 11 is CommonJS: the default import is the whole module.

import 'reflect-metadata';
import common from '@nestjs/common';
import core from '@nestjs/core';
import microservices from '@nestjs/microservices';
import nats from 'nats';
import rxjs from 'rxjs';
import { readFileSync } from 'node:fs';

const manifest = new URL('./node_modules/@nestjs/microservices/package.json', import.meta.url);

export const nest = { major: 11, version: JSON.parse(readFileSync(manifest, 'utf8')).version, common, core, microservices, nats, rxjs };
