// SPDX-License-Identifier: MIT OR Apache-2.0
//! `#[derive(RpcError)]` and `#[derive(Supervised)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Expr, Ident, Result, Token};

use crate::options::{arguments, unknown};

/// How an error crosses the wire.
#[derive(Clone)]
enum Form {
    Message,
    Code(Box<Expr>),
    Json,
    Unexpected,
}

pub(crate) fn rpc_error(input: TokenStream) -> TokenStream {
    expand_rpc_error(input).unwrap_or_else(Error::into_compile_error)
}

fn expand_rpc_error(input: TokenStream) -> Result<TokenStream> {
    let input: DeriveInput = syn::parse2(input)?;
    let name = &input.ident;
    let mut errors: Option<Error> = None;
    let mut read = |attributes: &[Attribute]| match form(attributes) {
        Ok(form) => form,
        Err(error) => {
            match &mut errors {
                Some(first) => first.combine(error),
                None => errors = Some(error),
            }
            None
        }
    };
    let whole = read(&input.attrs).unwrap_or(Form::Message);
    let body = match &input.data {
        Data::Struct(_) => convert(&whole, name),
        Data::Enum(data) => {
            let arms = data.variants.iter().map(|variant| {
                let convert = convert(&read(&variant.attrs).unwrap_or_else(|| whole.clone()), name);
                let (cfg, variant) = (
                    variant.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg")),
                    &variant.ident,
                );
                quote!(#(#cfg)* #name::#variant { .. } => #convert)
            });
            let arms: Vec<_> = arms.collect();
            quote!(match error { #(#arms,)* })
        }
        Data::Union(data) => {
            return Err(Error::new(
                data.union_token.span(),
                "`RpcError` can be derived for structs and enums",
            ));
        }
    };
    if let Some(error) = errors {
        return Err(error);
    }
    let (generics, arguments, bounds) = input.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #generics ::std::convert::From<#name #arguments> for ::martlet::RpcError #bounds {
            fn from(error: #name #arguments) -> Self {
                #body
            }
        }
    })
}

fn convert(form: &Form, name: &Ident) -> TokenStream {
    let at = name.span();
    let text = quote_spanned!(at=> ::std::string::ToString::to_string(&error));
    match form {
        Form::Message => quote!(::martlet::RpcError::message(#text)),
        Form::Code(code) => quote!(::martlet::__private::coded_error(#text, #code)),
        Form::Json => quote_spanned!(at=> ::martlet::RpcError::json(error)),
        Form::Unexpected => quote_spanned!(at=> ::martlet::RpcError::unexpected(error)),
    }
}

fn form(attributes: &[Attribute]) -> Result<Option<Form>> {
    let mut form = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("rpc")) {
        if arguments(attribute)?.is_none() {
            return Err(Error::new_spanned(
                attribute.path(),
                "say how the error crosses the wire: `#[rpc(code = …)]`, `#[rpc(json)]` or `#[rpc(unexpected)]`",
            ));
        }
        attribute.parse_args_with(|input: syn::parse::ParseStream<'_>| {
            while !input.is_empty() {
                let name: Ident = input.parse()?;
                let read = if name == "code" {
                    input.parse::<Token![=]>().map_err(|_| {
                        Error::new(name.span(), "`code` needs a value: `#[rpc(code = \"NOT_FOUND\")]`")
                    })?;
                    Form::Code(Box::new(input.parse()?))
                } else if name == "json" {
                    Form::Json
                } else if name == "unexpected" {
                    Form::Unexpected
                } else {
                    return Err(unknown(&name, &["code", "json", "unexpected"], "#[rpc]"));
                };
                if form.replace(read).is_some() {
                    return Err(Error::new(
                        name.span(),
                        "an error has one form: keep one of `code = …`, `json` and `unexpected`",
                    ));
                }
                if !input.is_empty() {
                    input.parse::<Token![,]>()?;
                }
            }
            Ok(())
        })?;
    }
    Ok(form)
}

pub(crate) fn supervised(input: TokenStream) -> TokenStream {
    let input: DeriveInput = match syn::parse2(input) {
        Ok(input) => input,
        Err(error) => return error.into_compile_error(),
    };
    let name = &input.ident;
    let (generics, arguments, bounds) = input.generics.split_for_impl();
    quote_spanned! {name.span()=>
        #[automatically_derived]
        impl #generics ::martlet::__private::actix::Supervised for #name #arguments #bounds {
            fn restarting(&mut self, _: &mut <Self as ::martlet::__private::actix::Actor>::Context) {
                if let ::std::option::Option::Some(fresh) = ::martlet::__private::rebuilt::<Self>() {
                    *self = fresh;
                }
            }
        }
    }
}
