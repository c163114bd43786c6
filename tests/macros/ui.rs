// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mistakes, and what the compiler says about them.

#[test]
fn a_mistake_is_a_compile_error_that_names_the_fix() {
    trybuild::TestCases::new().compile_fail("tests/macros/ui/*.rs");
}
