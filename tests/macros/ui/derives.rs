// SPDX-License-Identifier: MIT OR Apache-2.0
use martlet::RpcError;

#[derive(RpcError)]
enum Forms {
    #[rpc(cod = 1)]
    Typo,
    #[rpc(code)]
    NoValue,
    #[rpc(json, unexpected)]
    Two,
    #[rpc()]
    Nothing,
}

#[derive(RpcError)]
struct NoText;

fn main() {}
