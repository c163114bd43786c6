// SPDX-License-Identifier: MIT OR Apache-2.0

import { main } from '../peer/main.mjs';
import { nest } from './nest.mjs';

await main(nest, process.argv.slice(2));
