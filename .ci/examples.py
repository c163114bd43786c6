#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Run every example and compare what it prints with its header.

The header holds a block

    //! ```text
    //! $ cargo run --example NAME [--features F] [-- ARGUMENTS]
    //! what it prints
    //! ```

In the expected lines `…` stands for any text. A line `^C` means that the lines above it are waited for and
the program is then stopped with SIGINT, which it must survive long enough to end with status 0. An example whose source
mentions a broker's default URL (see BROKERS) gets a broker of its own: its URL is in the environment variable, and takes
the place of the default one in the arguments.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
LIMIT = 60
# A RabbitMQ node of its own: $1 is its folder, $2 its port, $3 and $4 those for distribution and epmd.
RABBITMQ = """
    export HOME="$1" RABBITMQ_HOME="$1" RABBITMQ_MNESIA_BASE="$1/mnesia" RABBITMQ_LOG_BASE="$1/log"
    export RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_ENABLED_PLUGINS_FILE="$1/plugins"
    export RABBITMQ_NODENAME="martlet$2@localhost" RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT="$2"
    export RABBITMQ_DIST_PORT="$3" ERL_EPMD_PORT="$4" ERL_EPMD_ADDRESS=127.0.0.1 RUNNING_UNDER_SYSTEMD=1
    echo "[]." > "$1/plugins"
    setpriv --pdeathsig KILL epmd -port "$4" -address 127.0.0.1 &
    exec /usr/lib/rabbitmq/bin/rabbitmq-server
"""


def mosquitto(port, folder):
    path = Path(folder) / "mosquitto.conf"
    path.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
    return ["mosquitto", "-c", str(path)]


# Scheme: the default URL, the environment variable, the program for a port and a folder.
BROKERS = {
    "nats": ("nats://127.0.0.1:4222", "NATS_URL",
             lambda port, _: ["nats-server", "-a", "127.0.0.1", "-p", str(port)]),
    "redis": ("redis://127.0.0.1:6379", "REDIS_URL",
              lambda port, _: ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "",
                               "--appendonly", "no"]),
    "amqp": ("amqp://127.0.0.1:5672", "RABBITMQ_URL",
             lambda port, folder: ["sh", "-c", RABBITMQ, "rabbitmq", folder, str(port), str(free_port()),
                                   str(free_port())]),
    "mqtt": ("mqtt://127.0.0.1:1883", "MQTT_URL", mosquitto),
}


def expected(source):
    """The command and the lines of the header's block."""
    header = [line[3:].removeprefix(" ") for line in source.splitlines() if line.startswith("//!")]
    blocks = re.findall(r"^```text\n(.*?)^```$", "\n".join(header) + "\n", re.S | re.M)
    for block in blocks:
        command, *lines = block.splitlines()
        if command.startswith("$ cargo run") and "--example" in command:
            return shlex.split(command[2:]), lines
    raise ValueError("its header has no ```text block that begins with `$ cargo run --example`")


def matches(line, wanted):
    return re.fullmatch(".*".join(map(re.escape, wanted.split("…"))), line) is not None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Broker:
    """A broker on a free port, for as long as the block runs."""

    def __init__(self, scheme):
        self.scheme = scheme

    def __enter__(self):
        self.port = free_port()
        self.log = tempfile.TemporaryFile()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = BROKERS[self.scheme][2](self.port, self.folder.name)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        # A RabbitMQ node takes its time.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return f"{self.scheme}://127.0.0.1:{self.port}"
            except OSError:
                time.sleep(0.05)
        self.__exit__()
        raise ValueError(f"{command[0]} did not start")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def run(name, command, lines, broker=None):
    arguments = command[command.index("--") + 1:] if "--" in command else []
    environment = dict(os.environ)
    if broker:
        scheme, url = broker
        default, variable, _ = BROKERS[scheme]
        environment[variable] = url
        arguments = [argument.replace(default, url) for argument in arguments]
    binary = TARGET / "debug" / "examples" / name
    interrupt = "^C" in lines
    first = lines.index("^C") if interrupt else len(lines)
    process = subprocess.Popen([binary, *arguments], env=environment, stdout=subprocess.PIPE, text=True,
                               stdin=subprocess.DEVNULL)
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    printed = []
    try:
        if interrupt:
            while len(printed) < first and (line := process.stdout.readline()):
                printed.append(line.rstrip("\n"))
            process.send_signal(signal.SIGINT)
        printed += process.stdout.read().splitlines()
        status = process.wait()
    finally:
        timed_out = not watchdog.is_alive()
        watchdog.cancel()
        process.kill()
        process.wait()
    if timed_out:
        raise ValueError(f"it did not end within {LIMIT} s; it printed {printed}")
    wanted = [line for line in lines if line != "^C"]
    if len(printed) != len(wanted) or not all(map(matches, printed, wanted)):
        show = "\n    ".join
        raise ValueError(f"expected:\n    {show(wanted)}\n  printed:\n    {show(printed)}")
    if status != 0:
        raise ValueError(f"it ended with status {status}")


def main():
    passed = failed = 0
    for path in sorted((ROOT / "examples").glob("*.rs")):
        source = path.read_text()
        try:
            command, lines = expected(source)
            scheme = next((scheme for scheme, (url, *_) in BROKERS.items() if url in source), None)
            if scheme:
                with Broker(scheme) as url:
                    run(path.stem, command, lines, (scheme, url))
            else:
                run(path.stem, command, lines)
        except (ValueError, OSError) as error:
            failed += 1
            print(f"example {path.stem}: FAILED\n  {error}", flush=True)
        else:
            passed += 1
            print(f"example {path.stem}: ok", flush=True)
    print(f"examples: {passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
