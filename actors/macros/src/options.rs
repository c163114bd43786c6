// SPDX-License-Identifier: MIT OR Apache-2.0
//! The arguments of `#[controller]`, `#[message_pattern]` and `#[event_pattern]`.

use proc_macro2::{Group, Span, TokenStream, TokenTree};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Error, Expr, ExprArray, ExprLit, Ident, Lit, LitStr, Result, Token, token};

const PATTERN_OPTIONS: [&str; 5] = ["transport", "queue", "extras", "concurrency", "interceptors"];
const CONTROLLER_OPTIONS: [&str; 2] = ["interceptors", "name"];
const TRANSPORTS: [&str; 8] = ["TCP", "REDIS", "NATS", "MQTT", "GRPC", "RMQ", "KAFKA", "MEMORY"];

/// What `#[controller(…)]` says.
#[derive(Default)]
pub(crate) struct ControllerOptions {
    pub(crate) name: Option<LitStr>,
    pub(crate) interceptors: Vec<Expr>,
}

/// What `#[message_pattern(…)]` or `#[event_pattern(…)]` says; parts are expressions to expand to.
#[derive(Default)]
pub(crate) struct PatternOptions {
    pub(crate) pattern: TokenStream,
    pub(crate) transport: Option<TokenStream>,
    pub(crate) queue: Option<Expr>,
    pub(crate) extras: Option<Group>,
    pub(crate) concurrency: Option<Expr>,
    pub(crate) interceptors: Vec<Expr>,
}

impl ControllerOptions {
    pub(crate) fn parse(tokens: TokenStream) -> Result<Self> {
        let parser = |input: ParseStream<'_>| {
            let mut options = Self::default();
            let mut seen = Vec::new();
            while !input.is_empty() {
                let name = input.call(Ident::parse_any)?;
                let value_of = known(&name, &CONTROLLER_OPTIONS, "#[controller]")?;
                once(&mut seen, &name)?;
                equals(input, &name)?;
                match value_of {
                    "name" => options.name = Some(input.parse()?),
                    _ => options.interceptors = list(input)?,
                }
                comma(input)?;
            }
            Ok(options)
        };
        parser.parse2(tokens)
    }
}

impl PatternOptions {
    /// Reads the tokens between the parentheses of the attribute `attribute`.
    pub(crate) fn parse(attribute: &Ident, tokens: TokenStream) -> Result<Self> {
        let parser = |input: ParseStream<'_>| {
            let mut options = Self::default();
            let mut seen = Vec::new();
            let mut positional = None;
            let mut members: Vec<(Ident, TokenStream)> = Vec::new();
            while !input.is_empty() {
                if !(input.peek(Ident::peek_any) && input.peek2(Token![=]) && !input.peek2(Token![==])) {
                    let at = input.span();
                    let pattern = positional_pattern(input, attribute)?;
                    if positional.replace(pattern).is_some() {
                        return Err(Error::new(
                            at,
                            format!(
                                "one pattern per attribute: add another `#[{attribute}(…)]` to the method for a further pattern"
                            ),
                        ));
                    }
                    comma(input)?;
                    continue;
                }
                let name = input.call(Ident::parse_any)?;
                let text = name.unraw().to_string();
                if PATTERN_OPTIONS.contains(&text.as_str()) {
                    once(&mut seen, &name)?;
                    equals(input, &name)?;
                    options.option(&text, input)?;
                } else if positional.is_some() {
                    return Err(unknown(&name, &PATTERN_OPTIONS, &format!("#[{attribute}]")));
                } else {
                    if let Some(near) = nearest(&text, &PATTERN_OPTIONS) {
                        return Err(Error::new(
                            name.span(),
                            format!(
                                "`{text}` looks like the option `{near}`: write that, or, if it is a member of the pattern, write the pattern as an object: `#[{attribute}({{ \"{text}\": … }})]`"
                            ),
                        ));
                    }
                    once(&mut seen, &name)?;
                    equals(input, &name)?;
                    members.push((name, json_value(input)?));
                }
                comma(input)?;
            }
            options.pattern = match (positional, members.as_slice()) {
                (Some(pattern), []) => pattern,
                (None, []) => return Err(no_pattern(attribute)),
                (None, members) => {
                    let keys =
                        members.iter().map(|(name, _)| LitStr::new(&name.unraw().to_string(), name.span()));
                    let values = members.iter().map(|(_, value)| value);
                    quote!(::martlet::pattern!({ #(#keys: #values),* }))
                }
                (Some(_), [(name, _), ..]) => {
                    return Err(unknown(name, &PATTERN_OPTIONS, &format!("#[{attribute}]")));
                }
            };
            Ok(options)
        };
        parser.parse2(tokens)
    }

    fn option(&mut self, name: &str, input: ParseStream<'_>) -> Result<()> {
        match name {
            "transport" => self.transport = Some(transport(input.parse()?)?),
            "queue" => self.queue = Some(input.parse()?),
            "extras" => {
                if !input.peek(token::Brace) {
                    return Err(input.error("extras are a JSON object: `extras = { \"key\": value }`"));
                }
                self.extras = Some(input.parse()?);
            }
            "concurrency" => {
                let value: Expr = input.parse()?;
                if let Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) = &value
                    && number.base10_digits() == "0"
                {
                    return Err(Error::new(
                        number.span(),
                        "with a concurrency of 0 no request would ever run: use at least 1, or leave the option out for no bound",
                    ));
                }
                self.concurrency = Some(value);
            }
            _ => self.interceptors = list(input)?,
        }
        Ok(())
    }
}

/// The error for an attribute without a pattern.
pub(crate) fn no_pattern(attribute: &Ident) -> Error {
    Error::new(
        attribute.span(),
        format!(
            "which pattern? write `#[{attribute}(\"name\")]`, `#[{attribute}({{ \"cmd\": \"name\" }})]` or `#[{attribute}(cmd = \"name\")]`"
        ),
    )
}

fn positional_pattern(input: ParseStream<'_>, attribute: &Ident) -> Result<TokenStream> {
    if input.peek(token::Brace) {
        let object: Group = input.parse()?;
        return Ok(quote!(::martlet::pattern!(#object)));
    }
    if input.peek(token::Bracket) {
        let array: Group = input.parse()?;
        return Err(Error::new(
            array.span(),
            format!("an array is several patterns in NestJS: write one `#[{attribute}(…)]` for each of them"),
        ));
    }
    let value: Expr = input.parse()?;
    let literal = match &value {
        Expr::Lit(ExprLit { lit, .. }) => Some(lit),
        _ => None,
    };
    let null = matches!(&value, Expr::Path(path) if path.path.is_ident("null"));
    match literal {
        Some(Lit::Str(_) | Lit::Int(_)) => {}
        Some(_) => return Err(not_a_pattern(&value)),
        None if null => return Err(not_a_pattern(&value)),
        None => {}
    }
    let at = value.span();
    Ok(quote_spanned!(at=> ::martlet::pattern!(#value)))
}

fn not_a_pattern(value: &Expr) -> Error {
    Error::new_spanned(value, "a pattern is a string, a whole number or a JSON object")
}

/// A JSON value: tokens for `json!`.
fn json_value(input: ParseStream<'_>) -> Result<TokenStream> {
    if input.peek(token::Brace) || input.peek(token::Bracket) {
        return input.parse::<TokenTree>().map(TokenStream::from);
    }
    let value: Expr = input.parse()?;
    Ok(quote!(#value))
}

fn transport(value: Expr) -> Result<TokenStream> {
    match &value {
        Expr::Path(path) if let Some(name) = path.path.get_ident() => {
            let text = name.to_string();
            if TRANSPORTS.contains(&text.as_str()) {
                return Ok(quote_spanned!(name.span()=> ::martlet::TransportId::#name));
            }
            match TRANSPORTS.iter().find(|known| known.eq_ignore_ascii_case(&text)) {
                Some(known) => Err(Error::new(name.span(), format!("write `transport = {known}`"))),
                // A constant or variable of the user's.
                None => Ok(quote!(#value)),
            }
        }
        Expr::Lit(_) => Err(Error::new_spanned(
            &value,
            format!(
                "a transport is one of {}, or an expression of type `TransportId`",
                TRANSPORTS.join(", ")
            ),
        )),
        _ => Ok(quote!(#value)),
    }
}

fn list(input: ParseStream<'_>) -> Result<Vec<Expr>> {
    if !input.peek(token::Bracket) {
        return Err(input.error("interceptors are a list: `interceptors = [first, second]`"));
    }
    let array: ExprArray = input.parse()?;
    Ok(array.elems.into_iter().collect())
}

fn comma(input: ParseStream<'_>) -> Result<()> {
    if !input.is_empty() {
        input.parse::<Token![,]>()?;
    }
    Ok(())
}

fn equals(input: ParseStream<'_>, name: &Ident) -> Result<()> {
    if !input.peek(Token![=]) {
        return Err(Error::new(name.span(), format!("`{name}` needs a value: `{name} = …`")));
    }
    input.parse::<Token![=]>()?;
    Ok(())
}

fn once(seen: &mut Vec<String>, name: &Ident) -> Result<()> {
    let text = name.unraw().to_string();
    if seen.contains(&text) {
        return Err(Error::new(name.span(), format!("`{text}` is given twice: keep one")));
    }
    seen.push(text);
    Ok(())
}

fn known(name: &Ident, options: &[&'static str], whose: &str) -> Result<&'static str> {
    let text = name.unraw().to_string();
    options.iter().copied().find(|option| *option == text).ok_or_else(|| unknown(name, options, whose))
}

/// The error for an option that does not exist, with the one that was probably meant.
pub(crate) fn unknown(name: &Ident, options: &[&str], whose: &str) -> Error {
    let text = name.unraw().to_string();
    let list = options.iter().map(|option| format!("`{option}`")).collect::<Vec<_>>().join(", ");
    let message = match nearest(&text, options) {
        Some(near) => format!("`{whose}` has no option `{text}`: did you mean `{near}`?"),
        None => format!("`{whose}` has no option `{text}`: it has {list}"),
    };
    Error::new(name.span(), message)
}

fn nearest<'a>(text: &str, options: &[&'a str]) -> Option<&'a str> {
    let near = |option: &&&str| strsim::damerau_levenshtein(text, option) <= option.len().div_ceil(4);
    options.iter().filter(near).min_by_key(|option| strsim::damerau_levenshtein(text, option)).copied()
}

/// The tokens of an attribute's parentheses; `None` if it has none.
pub(crate) fn arguments(attribute: &syn::Attribute) -> Result<Option<TokenStream>> {
    match &attribute.meta {
        syn::Meta::Path(_) => Ok(None),
        syn::Meta::List(list) if matches!(list.delimiter, syn::MacroDelimiter::Paren(_)) => {
            Ok((!list.tokens.is_empty()).then(|| list.tokens.clone()))
        }
        other => Err(Error::new_spanned(other, "write the arguments in parentheses: `#[attribute(…)]`")),
    }
}

/// A span that counts as the user's own code.
pub(crate) fn place(attribute: &syn::Attribute) -> Span {
    attribute.path().segments.last().map_or_else(|| attribute.span(), |segment| segment.ident.span())
}
