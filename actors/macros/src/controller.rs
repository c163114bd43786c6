// SPDX-License-Identifier: MIT OR Apache-2.0
//! `#[controller]`.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{
    Attribute, Error, FnArg, GenericArgument, Ident, ImplItem, ImplItemFn, ItemImpl, LitStr, PathArguments,
    Result, ReturnType, Type, TypeParamBound,
};

use crate::options::{ControllerOptions, PatternOptions, arguments, no_pattern, place};

/// Errors of the whole block, to be reported at once.
#[derive(Default)]
struct Errors(Option<Error>);

impl Errors {
    fn push(&mut self, error: Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.push(error)).ok()
    }
}

pub(crate) fn expand(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let mut block: ItemImpl = match syn::parse2(item.clone()) {
        Ok(block) => block,
        Err(error) => {
            // Broken syntax is the compiler's to report, where it is; anything else is not an impl block.
            let error = match syn::parse2::<syn::Item>(item.clone()) {
                Ok(other) => not_an_impl(&other),
                Err(_) => error,
            };
            let error = error.into_compile_error();
            return quote!(#error #item);
        }
    };
    let mut errors = Errors::default();
    let options = errors.keep(ControllerOptions::parse(arguments)).unwrap_or_default();
    if let Some((_, path, _)) = &block.trait_ {
        errors.push(Error::new_spanned(
            path,
            "`#[controller]` goes on the type's own block, `impl Type { … }`, not on a trait's",
        ));
    }
    let generic = !block.generics.params.is_empty();
    if generic {
        errors.push(Error::new_spanned(
            &block.generics,
            "a controller cannot be generic, because its handlers are listed once: write the block for one type, `impl Type<Concrete> { … }`",
        ));
    }
    let type_name = type_name(&block.self_ty);
    let mut handlers = Vec::new();
    let mut any = false;
    for item in &mut block.items {
        if let ImplItem::Fn(method) = item {
            let patterns = take_patterns(method, &mut errors);
            any |= patterns.found;
            handlers.extend(handler(method, patterns, &type_name, &mut errors));
        }
    }
    if !any && block.trait_.is_none() {
        errors.push(Error::new(
            Span::call_site(),
            "this block has no handler: put `#[message_pattern(\"…\")]` or `#[event_pattern(\"…\")]` on a method",
        ));
    }

    let self_ty = &block.self_ty;
    if let Some(error) = errors.0 {
        let error = error.into_compile_error();
        // The stub keeps a mistake here from being reported again wherever the controller is used.
        let stub = (!generic && block.trait_.is_none()).then(|| {
            quote! {
                impl ::martlet::__private::Controller for #self_ty {
                    fn handlers() -> ::std::vec::Vec<::martlet::__private::HandlerDef<Self>> {
                        ::std::vec::Vec::new()
                    }
                }
            }
        });
        return quote!(#error #block #stub);
    }
    let name = options.name.unwrap_or_else(|| LitStr::new(&type_name, Span::call_site()));
    let interceptors = interceptors(&options.interceptors);
    quote! {
        #block

        #[automatically_derived]
        impl ::martlet::__private::Controller for #self_ty {
            fn name() -> &'static str {
                #name
            }

            fn interceptors() -> ::martlet::__private::Interceptors {
                #interceptors
            }

            #[allow(clippy::all, clippy::pedantic)]
            fn handlers() -> ::std::vec::Vec<::martlet::__private::HandlerDef<Self>> {
                let mut __handlers = ::std::vec::Vec::new();
                #(#handlers)*
                __handlers
            }
        }
    }
}

/// The attribute macro `#[message_pattern]` or `#[event_pattern]` where no `#[controller]` took it away.
pub(crate) fn stray_pattern(attribute: &str, item: TokenStream) -> TokenStream {
    let text = match syn::parse2::<syn::ItemFn>(item.clone()) {
        Ok(function) if !has_receiver(&function.sig) => {
            let make = attribute.trim_end_matches("_pattern");
            format!(
                "`#[{attribute}]` goes on a method of a block with `#[controller]`; a function is registered with `martlet::{make}(pattern, {})`",
                function.sig.ident
            )
        }
        _ => format!(
            "`#[{attribute}]` is read by `#[controller]`: put `#[controller]` on the `impl` block around this method"
        ),
    };
    let error = Error::new(Span::call_site(), text).into_compile_error();
    quote!(#error #item)
}

fn has_receiver(signature: &syn::Signature) -> bool {
    signature.receiver().is_some()
}

fn not_an_impl(item: &syn::Item) -> Error {
    let text = match item {
        syn::Item::Struct(item) => {
            format!(
                "`#[controller]` goes on the block with the methods: `#[controller] impl {} {{ … }}`",
                item.ident
            )
        }
        _ => "`#[controller]` goes on an `impl Type { … }` block".to_owned(),
    };
    Error::new(Span::call_site(), text)
}

fn type_name(ty: &Type) -> String {
    match ty {
        Type::Path(path) => {
            path.path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default()
        }
        other => quote!(#other).to_string(),
    }
}

// === one method ===

/// The pattern attributes of a method, taken off it.
struct Patterns {
    found: bool,
    read: Vec<(&'static str, Span, PatternOptions)>,
}

fn take_patterns(method: &mut ImplItemFn, errors: &mut Errors) -> Patterns {
    let mut patterns = Patterns { found: false, read: Vec::new() };
    let mut rest = Vec::new();
    for attribute in std::mem::take(&mut method.attrs) {
        let Some(name) = attribute.path().segments.last().map(|segment| segment.ident.clone()) else {
            rest.push(attribute);
            continue;
        };
        let kind = if name == "message_pattern" {
            "Message"
        } else if name == "event_pattern" {
            "Event"
        } else {
            rest.push(attribute);
            continue;
        };
        patterns.found = true;
        let read = arguments(&attribute).and_then(|tokens| match tokens {
            Some(tokens) => PatternOptions::parse(&name, tokens),
            None => Err(no_pattern(&name)),
        });
        if let Some(options) = errors.keep(read) {
            patterns.read.push((kind, place(&attribute), options));
        }
    }
    method.attrs = rest;
    patterns
}

/// How an argument is read from the request.
enum Source {
    Extractor,
    Payload,
    Property(LitStr),
}

fn handler(
    method: &mut ImplItemFn,
    patterns: Patterns,
    type_name: &str,
    errors: &mut Errors,
) -> Vec<TokenStream> {
    let marks = take_payload_marks(method, errors);
    if !patterns.found {
        for (_, mark, _) in &marks {
            errors.push(Error::new_spanned(
                mark,
                format!(
                    "`{}` is no handler, so nothing fills this argument: put `#[message_pattern(\"…\")]` or `#[event_pattern(\"…\")]` on it, or remove `#[payload]`",
                    method.sig.ident
                ),
            ));
        }
        return Vec::new();
    }
    check_signature(&method.sig, errors);
    let endpoint = endpoint(&method.sig, &marks);
    let cfg: Vec<_> = method.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg")).collect();
    let name = format!("{type_name}::{}", method.sig.ident);
    let defs = patterns.read.iter().map(|(kind, at, options)| def(&name, kind, *at, options));
    let block = quote! {
        #(#cfg)*
        {
            let __endpoint: fn(&::std::rc::Rc<Self>) -> ::std::boxed::Box<dyn ::martlet::__private::Endpoint> =
                #endpoint;
            #(#defs)*
        }
    };
    vec![block]
}

fn take_payload_marks(method: &mut ImplItemFn, errors: &mut Errors) -> Vec<(usize, Attribute, Source)> {
    let mut marks: Vec<(usize, Attribute, Source)> = Vec::new();
    for (index, argument) in method.sig.inputs.iter_mut().enumerate() {
        let FnArg::Typed(argument) = argument else { continue };
        let mut rest = Vec::new();
        for attribute in std::mem::take(&mut argument.attrs) {
            if attribute.path().segments.last().is_none_or(|segment| segment.ident != "payload") {
                rest.push(attribute);
                continue;
            }
            let source = arguments(&attribute).and_then(|tokens| match tokens {
                None => Ok(Source::Payload),
                Some(tokens) => syn::parse2(tokens.clone()).map(Source::Property).map_err(|_| {
                    Error::new_spanned(
                        &tokens,
                        "name one property of the payload as a string: `#[payload(\"key\")]`",
                    )
                }),
            });
            if marks.last().is_some_and(|(last, ..)| *last == index) {
                errors.push(Error::new_spanned(&attribute, "`#[payload]` is given twice: keep one"));
            } else if let Some(source) = errors.keep(source) {
                marks.push((index, attribute, source));
            }
        }
        argument.attrs = rest;
    }
    marks
}

fn check_signature(signature: &syn::Signature, errors: &mut Errors) {
    match signature.receiver() {
        None => errors.push(Error::new_spanned(
            &signature.ident,
            format!(
                "a handler of a controller is a method: add `&self` (`fn {}(&self, …)`), or register a function with `martlet::message(pattern, function)`",
                signature.ident
            ),
        )),
        Some(receiver) => {
            let owned = receiver.reference.is_none() && !matches!(&*receiver.ty, Type::Reference(_));
            let exclusive = receiver.reference.is_some() && receiver.mutability.is_some()
                || matches!(&*receiver.ty, Type::Reference(ty) if ty.mutability.is_some());
            if exclusive {
                errors.push(Error::new_spanned(
                    receiver,
                    "a handler takes `&self`, because the handlers of a controller run concurrently: keep what changes in a `Cell`, `RefCell` or `Mutex`, or make it an actor (`martlet::ActorGroup`)",
                ));
            } else if owned {
                errors.push(Error::new_spanned(
                    receiver,
                    "a handler takes `&self`, because the controller serves further requests",
                ));
            }
        }
    }
    if !signature.generics.params.is_empty() {
        errors.push(Error::new_spanned(
            &signature.generics,
            "a handler cannot be generic: the types of its arguments say how the request is read",
        ));
    }
    if let Some(unsafety) = &signature.unsafety {
        errors.push(Error::new_spanned(
            unsafety,
            "a handler cannot be unsafe: the runtime calls it on any request",
        ));
    }
    for argument in &signature.inputs {
        let FnArg::Typed(argument) = argument else { continue };
        let text = match &*argument.ty {
            Type::Reference(reference) => match &*reference.elem {
                Type::Path(path) if path.path.is_ident("str") => {
                    "a handler owns its arguments: take `String` instead of `&str`".to_owned()
                }
                Type::Slice(slice) => {
                    let element = &slice.elem;
                    let element = quote!(#element).to_string();
                    format!("a handler owns its arguments: take `Vec<{element}>` instead of a slice")
                }
                _ => "a handler owns its arguments: take the type without `&`".to_owned(),
            },
            Type::ImplTrait(_) => {
                "name the type of this argument: it says how the request is read".to_owned()
            }
            _ => continue,
        };
        errors.push(Error::new_spanned(&argument.ty, text));
    }
}

fn def(name: &str, kind: &str, at: Span, options: &PatternOptions) -> TokenStream {
    let kind = Ident::new(kind, Span::call_site());
    let pattern = &options.pattern;
    let transport = options.transport.iter().map(|transport| {
        quote_spanned!(transport.span()=> __info.transport = ::std::option::Option::Some(#transport);)
    });
    let concurrency = options.concurrency.iter().map(|max| {
        quote_spanned! {max.span()=>
            let max: usize = #max;
            __info.concurrency = ::std::option::Option::Some(max.max(1));
        }
    });
    let extras = options.extras.iter().map(
        |extras| quote!(::martlet::__private::add_extras(&mut __info, ::martlet::__private::json!(#extras));),
    );
    let queue = options
        .queue
        .iter()
        .map(|queue| quote!(::martlet::__private::add_extra(&mut __info, "queue", #queue);));
    let interceptors = interceptors(&options.interceptors);
    // The call's own span decides what `Location::caller` sees, so it must be the user's.
    let new = quote_spanned! {at=>
        ::martlet::__private::HandlerInfo::new(#name, ::martlet::__private::HandlerKind::#kind, pattern)
    };
    quote! {{
        let pattern: ::martlet::__private::Pattern = #pattern;
        #[allow(unused_mut)]
        let mut __info = #new;
        #(#transport)*
        #(#concurrency)*
        #(#extras)*
        #(#queue)*
        let __interceptors = #interceptors;
        __handlers.push(::martlet::__private::HandlerDef {
            info: __info,
            interceptors: __interceptors,
            endpoint: __endpoint,
        });
    }}
}

fn interceptors(list: &[syn::Expr]) -> TokenStream {
    quote! {{
        #[allow(unused_mut)]
        let mut __list: ::martlet::__private::Interceptors = ::std::vec::Vec::new();
        #(__list.push(#list);)*
        __list
    }}
}

// === the call ===

fn endpoint(signature: &syn::Signature, marks: &[(usize, Attribute, Source)]) -> TokenStream {
    let method = &signature.ident;
    let mut names = Vec::new();
    let mut reads = Vec::new();
    for (index, argument) in signature.inputs.iter().enumerate() {
        let FnArg::Typed(argument) = argument else { continue };
        let (name, ty) = (format_ident!("argument_{index}"), &argument.ty);
        let at = ty.span();
        let source = marks.iter().find(|(marked, ..)| *marked == index).map(|(_, _, source)| source);
        let read = match source.unwrap_or(&Source::Extractor) {
            Source::Payload => quote_spanned!(at=> ::martlet::__private::payload::<#ty>(&request)?),
            Source::Property(key) => {
                quote_spanned!(at=> ::martlet::__private::property::<#ty>(&request, #key)?)
            }
            Source::Extractor => quote_spanned!(at=> ::martlet::__private::extract(&request).await?),
        };
        reads.push(quote!(let #name: #ty = #read;));
        names.push(name);
    }
    let shape = Shape::of(&signature.output);
    let wait = signature.asyncness.is_some().then(|| quote!(.await));
    let result = quote!(Self::#method(controller, #(#names),*) #wait);
    let at = match &signature.output {
        ReturnType::Default => Span::call_site(),
        ReturnType::Type(_, ty) => ty.span(),
    };
    if shape.stream {
        let all = Ident::new(if shape.items_fail { "try_send_all" } else { "send_all" }, at);
        let fail = quote_spanned!(at=> out.fail(error));
        let started = if shape.fails {
            quote! {
                match #result {
                    ::std::result::Result::Ok(stream) => stream,
                    ::std::result::Result::Err(error) => return #fail.await,
                }
            }
        } else {
            result
        };
        let send = quote_spanned!(at=> out.#all(format, stream).await);
        // The stream may borrow the controller, so both live in one future.
        let reply = quote! {
            ::martlet::__private::stream_reply(move |out| async move {
                let controller: &Self = &controller;
                let stream = #started;
                #send
            })
            .await
        };
        reads.insert(0, quote!(let format = request.format();));
        return in_future(&reads, &reply);
    }
    let reply = match &signature.output {
        ReturnType::Default => quote! {
            #result;
            ::std::result::Result::<(), ::martlet::__private::RpcError>::Ok(())
        },
        ReturnType::Type(..) => {
            let fail = quote_spanned!(at=> ::martlet::__private::fail(error));
            let value = if shape.fails {
                quote! {
                    match #result {
                        ::std::result::Result::Ok(value) => value,
                        ::std::result::Result::Err(error) => return #fail,
                    }
                }
            } else {
                result
            };
            let answer = quote_spanned!(at=> ::martlet::__private::answer(value));
            quote! {
                let value = #value;
                #answer
            }
        }
    };
    reads.push(quote!(let controller: &Self = &controller;));
    in_future(&reads, &reply)
}

/// The endpoint that reads the arguments of a method and calls it.
fn in_future(reads: &[TokenStream], call: &TokenStream) -> TokenStream {
    quote! {
        |controller| {
            let controller = ::std::rc::Rc::clone(controller);
            ::martlet::__private::endpoint(move |request: ::martlet::__private::Request| {
                let controller = ::std::rc::Rc::clone(&controller);
                async move {
                    #(#reads)*
                    ::std::mem::drop(request);
                    #call
                }
            })
        }
    }
}

/// What a return type says, by its spelling.
#[derive(Default)]
struct Shape {
    /// It is a `Result`.
    fails: bool,
    /// It, or the value in the result, is a stream.
    stream: bool,
    /// The items of the stream are results.
    items_fail: bool,
}

impl Shape {
    fn of(output: &ReturnType) -> Self {
        let ReturnType::Type(_, ty) = output else { return Self::default() };
        let fails = is_result(ty);
        let value = if fails { first_argument(ty) } else { Some(&**ty) };
        let item = value.and_then(stream_item);
        Self { fails, stream: item.is_some(), items_fail: item.flatten().is_some_and(is_result) }
    }
}

fn last_segment(ty: &Type) -> Option<&syn::PathSegment> {
    match ty {
        Type::Path(path) => path.path.segments.last(),
        Type::Group(group) => last_segment(&group.elem),
        Type::Paren(paren) => last_segment(&paren.elem),
        _ => None,
    }
}

fn is_result(ty: &Type) -> bool {
    last_segment(ty).is_some_and(|segment| segment.ident.to_string().ends_with("Result"))
}

fn type_arguments(arguments: &PathArguments) -> impl Iterator<Item = &Type> {
    let arguments = match arguments {
        PathArguments::AngleBracketed(arguments) => Some(&arguments.args),
        _ => None,
    };
    arguments.into_iter().flatten().filter_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    })
}

fn first_argument(ty: &Type) -> Option<&Type> {
    type_arguments(&last_segment(ty)?.arguments).next()
}

/// `Some` if the type is a stream by its spelling; inside, the type of its items where it is spelled.
fn stream_item(ty: &Type) -> Option<Option<&Type>> {
    let Type::ImplTrait(bounds) = ty else {
        let segment = last_segment(ty)?;
        let boxed = segment.ident == "BoxStream" || segment.ident == "LocalBoxStream";
        return boxed.then(|| first_argument(ty));
    };
    bounds.bounds.iter().find_map(|bound| {
        let TypeParamBound::Trait(bound) = bound else { return None };
        let segment = bound.path.segments.last().filter(|segment| segment.ident == "Stream")?;
        let PathArguments::AngleBracketed(arguments) = &segment.arguments else { return Some(None) };
        Some(arguments.args.iter().find_map(|argument| match argument {
            GenericArgument::AssocType(item) if item.ident == "Item" => Some(&item.ty),
            _ => None,
        }))
    })
}
