// SPDX-License-Identifier: MIT OR Apache-2.0
//! What transporters define their options with: one list gives typed builders, serde data and the names for
//! checking configuration.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use crate::headers::Headers;

/// Defines the options types of a transporter's two sides from one list of common options and one list each
/// of their own.
///
/// For each side it makes a struct with `Default`, `Deserialize` (unknown keys are refused), `OPTION_KEYS` (the
/// names in data), `new`, and a builder method for each option; and the crate-private `Common`, the common
/// options alone. An option is written
///
/// ```text
/// /// What it does, its unit, its default, what happens at the limit.
/// #[serde(with = "millis")]
/// "nameInData" name_in_rust: Type = default, (ArgumentOfTheBuilder) |argument| value_of_the_field;
/// ```
///
/// Options after `from code` have no form in data. The calling crate depends on `serde`.
#[macro_export]
macro_rules! transport_options {
    (
        common { $($common:tt)* }
        $(#[$server_doc:meta])* server $server:ident { $($server_own:tt)* } from code { $($server_code:tt)* }
        $(#[$client_doc:meta])* client $client:ident { $($client_own:tt)* } from code { $($client_code:tt)* }
    ) => {
        $crate::transport_options! {
            @side $(#[$server_doc])* pub struct $server { $($common)* $($server_own)* } from code { $($server_code)* }
        }
        $crate::transport_options! {
            @side $(#[$client_doc])* pub struct $client { $($common)* $($client_own)* } from code { $($client_code)* }
        }
        $crate::transport_options! { @common $server $client { $($common)* } }
    };
    (
        @side $(#[$doc:meta])*
        pub struct $name:ident {
            $(
                $(#[doc = $text:literal])+
                $(#[serde($($serde:tt)*)])?
                $key:literal $field:ident: $type:ty = $default:expr,
                    ($argument:ty) |$value:ident| $set:expr;
            )*
        }
        from code {
            $($(#[doc = $code_text:literal])+ $code:ident: $code_type:ty = $code_default:expr;)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, ::serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[non_exhaustive]
        pub struct $name {
            $(
                $(#[doc = $text])+
                #[serde(rename = $key $(, $($serde)*)?)]
                pub $field: $type,
            )*
            $(
                $(#[doc = $code_text])+
                #[serde(skip)]
                pub $code: $code_type,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* $($code: $code_default,)* }
            }
        }

        impl $name {
            /// The names of the options, as configuration files have them.
            pub const OPTION_KEYS: &'static [&'static str] = &[$($key),*];

            /// The defaults.
            pub fn new() -> Self {
                Self::default()
            }

            $(
                $(#[doc = $text])+
                #[must_use]
                pub fn $field(mut self, $value: $argument) -> Self {
                    self.$field = $set;
                    self
                }
            )*

            $(
                $(#[doc = $code_text])+
                #[must_use]
                pub fn $code(mut self, $code: $code_type) -> Self {
                    self.$code = $code;
                    self
                }
            )*
        }
    };
    (@common $server:ident $client:ident {
        $(
            $(#[doc = $text:literal])+
            $(#[serde($($serde:tt)*)])?
            $key:literal $field:ident: $type:ty = $default:expr,
                ($argument:ty) |$value:ident| $set:expr;
        )*
    }) => {
        /// What both sides need to make a session.
        #[derive(Clone)]
        pub(crate) struct Common {
            $(pub(crate) $field: $type,)*
        }

        impl $server {
            pub(crate) fn common(&self) -> Common {
                Common { $($field: self.$field.clone(),)* }
            }
        }

        impl $client {
            pub(crate) fn common(&self) -> Common {
                Common { $($field: self.$field.clone(),)* }
            }
        }
    };
}

/// Durations that are whole milliseconds in data.
pub mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// For `#[serde(with = "millis")]`.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.as_millis().try_into().unwrap_or(u64::MAX))
    }

    /// For `#[serde(with = "millis")]`.
    ///
    /// # Errors
    ///
    /// When it is no whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// Durations that are whole milliseconds, or null, in data.
pub mod optional_millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer};

    /// For `#[serde(with = "optional_millis")]`.
    ///
    /// # Errors
    ///
    /// When it is neither a whole number nor null.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A list of texts, or one text whose parts commas separate: for `#[serde(deserialize_with)]`.
///
/// # Errors
///
/// When it is neither.
pub fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(text) => {
            text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
        }
        OneOrMany::Many(parts) => parts,
    })
}

/// Headers as an object whose values are texts or lists of texts: for `#[serde(deserialize_with)]`.
///
/// # Errors
///
/// When it is anything else.
pub fn header_lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
    let mut headers = Headers::new();
    for (name, values) in BTreeMap::<String, OneOrMany>::deserialize(deserializer)? {
        match values {
            OneOrMany::One(value) => headers.append(name, value),
            OneOrMany::Many(values) => {
                values.into_iter().for_each(|value| headers.append(name.clone(), value));
            }
        }
    }
    Ok(headers)
}

/// Undoes the percent-encoding of a part of a URL (a user, a password). What is no encoding stays as it is.
pub fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        let hex = |at: usize| char::from(*more.get(at)?).to_digit(16);
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &more[2..];
            }
            _ => {
                bytes.push(first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::percent_decoded;

    #[test]
    fn percent_encoding_is_undone_and_anything_else_left_alone() {
        for (text, decoded) in
            [("us%40er", "us@er"), ("p%3Aw%25", "p:w%"), ("100%", "100%"), ("%zz", "%zz"), ("%c3%bc", "ü")]
        {
            assert_eq!(percent_decoded(text), decoded);
        }
    }
}
