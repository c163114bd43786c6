// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads options from data whose values may all be texts, as URLs and the environment have them.
//!
//! The type that is read decides: a text becomes a number where a number is wanted, and stays a text where a
//! text is wanted, so that a password `1234` is no number. Errors know the option they are about.

use std::fmt;

use serde::de::value::StringDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};
use serde_json::{Map, Value};

/// What is wrong with which option.
#[derive(Debug)]
pub(super) struct LooseError {
    /// From the outermost option to the one in question.
    pub(super) path: Vec<String>,
    pub(super) fault: Fault,
}

#[derive(Debug)]
pub(super) enum Fault {
    Unknown { option: String, known: &'static [&'static str] },
    Invalid(String),
}

impl LooseError {
    fn invalid(reason: impl Into<String>) -> Self {
        Self { path: Vec::new(), fault: Fault::Invalid(reason.into()) }
    }

    fn within(mut self, option: &str) -> Self {
        self.path.insert(0, option.to_owned());
        self
    }
}

impl fmt::Display for LooseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            Fault::Unknown { option, .. } => write!(f, "unknown option {option}"),
            Fault::Invalid(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for LooseError {}

impl de::Error for LooseError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::invalid(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self { path: Vec::new(), fault: Fault::Unknown { option: field.to_owned(), known: expected } }
    }
}

/// A value that is read as the type asks.
pub(super) struct Loose(pub(super) Value);

impl Loose {
    fn number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), _, _) => visitor.visit_u64(number),
                (_, Some(number), _) => visitor.visit_i64(number),
                (_, _, Some(number)) => visitor.visit_f64(number),
                _ => Err(LooseError::invalid(format!("{number} is out of range"))),
            },
            Value::String(text) => {
                let trimmed = text.trim();
                if let Ok(number) = trimmed.parse::<u64>() {
                    visitor.visit_u64(number)
                } else if let Ok(number) = trimmed.parse::<i64>() {
                    visitor.visit_i64(number)
                } else {
                    match trimmed.parse::<f64>() {
                        Ok(number) if number.is_finite() => visitor.visit_f64(number),
                        _ => Err(LooseError::invalid(format!("{text:?} is not a number"))),
                    }
                }
            }
            other => Err(LooseError::invalid(format!("{other} is not a number"))),
        }
    }

    fn text<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            Value::Number(number) => visitor.visit_string(number.to_string()),
            other => Err(LooseError::invalid(format!("{other} is not a text"))),
        }
    }
}

macro_rules! numbers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
            self.number(visitor)
        }
    )*};
}

macro_rules! texts {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
            self.text(visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for Loose {
    type Error = LooseError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(_) => self.number(visitor),
            Value::String(text) => visitor.visit_string(text),
            Value::Array(items) => visitor.visit_seq(Items(items.into_iter())),
            Value::Object(members) => visitor.visit_map(Members::new(members)),
        }
    }

    numbers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
        deserialize_f32 deserialize_f64
    }

    texts! { deserialize_char deserialize_str deserialize_string }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match &self.0 {
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::String(text) => match text.trim() {
                // `?gracefulShutdown` alone turns it on.
                "true" | "1" | "" => visitor.visit_bool(true),
                "false" | "0" => visitor.visit_bool(false),
                _ => Err(LooseError::invalid(format!("{text:?} is neither true nor false"))),
            },
            other => Err(LooseError::invalid(format!("{other} is neither true nor false"))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match &self.0 {
            Value::Null => visitor.visit_none(),
            Value::String(text) if text == "null" => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::Array(items) => visitor.visit_seq(Items(items.into_iter())),
            Value::String(text) => {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                let items: Vec<_> = parts.map(|part| Value::String(part.to_owned())).collect();
                visitor.visit_seq(Items(items.into_iter()))
            }
            other => Err(LooseError::invalid(format!("{other} is not a list"))),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::Object(members) => visitor.visit_map(Members::new(members)),
            other => Err(LooseError::invalid(format!("{other} is not a group of options"))),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, LooseError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, LooseError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, LooseError> {
        match self.0 {
            Value::String(text) => visitor.visit_enum(text.into_deserializer()),
            // `onFailure.retry.attempts=3`: a name with options of its own.
            Value::Object(members) if members.len() == 1 => visitor.visit_enum(Variant(members)),
            other => Err(LooseError::invalid(format!("{other} is not a name"))),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, LooseError> {
        self.text(visitor)
    }

    serde::forward_to_deserialize_any! { bytes byte_buf unit unit_struct tuple tuple_struct ignored_any }
}

impl<'de> IntoDeserializer<'de, LooseError> for Loose {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

struct Items(std::vec::IntoIter<Value>);

impl<'de> SeqAccess<'de> for Items {
    type Error = LooseError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, LooseError> {
        self.0.next().map(|item| seed.deserialize(Loose(item))).transpose()
    }
}

struct Members {
    rest: serde_json::map::IntoIter,
    current: Option<(String, Value)>,
}

impl Members {
    fn new(members: Map<String, Value>) -> Self {
        Self { rest: members.into_iter(), current: None }
    }
}

impl<'de> MapAccess<'de> for Members {
    type Error = LooseError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, LooseError> {
        self.current = self.rest.next();
        match &self.current {
            Some((key, _)) => {
                let key: StringDeserializer<LooseError> = key.clone().into_deserializer();
                seed.deserialize(key).map(Some)
            }
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, LooseError> {
        let Some((key, value)) = self.current.take() else {
            return Err(LooseError::invalid("a value without its name"));
        };
        seed.deserialize(Loose(value)).map_err(|error| error.within(&key))
    }
}

/// A name with a value.
struct Variant(Map<String, Value>);

impl<'de> EnumAccess<'de> for Variant {
    type Error = LooseError;
    type Variant = Content;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Content), LooseError> {
        let Some((name, value)) = self.0.into_iter().next() else {
            return Err(LooseError::invalid("an empty group is not a name"));
        };
        let key: StringDeserializer<LooseError> = name.clone().into_deserializer();
        Ok((seed.deserialize(key)?, Content { name, value }))
    }
}

struct Content {
    name: String,
    value: Value,
}

impl<'de> VariantAccess<'de> for Content {
    type Error = LooseError;

    fn unit_variant(self) -> Result<(), LooseError> {
        Err(LooseError::invalid(format!("{} has no options of its own", self.name)))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, LooseError> {
        seed.deserialize(Loose(self.value)).map_err(|error| error.within(&self.name))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, LooseError> {
        Loose(self.value).deserialize_seq(visitor).map_err(|error| error.within(&self.name))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, LooseError> {
        Loose(self.value).deserialize_map(visitor).map_err(|error| error.within(&self.name))
    }
}
