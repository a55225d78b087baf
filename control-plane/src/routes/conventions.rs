//! What holds for every operation alike, as the layers around the routes do it, written into the OpenAPI document.

use ark_types::idempotency::{IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED, MAX_KEY};
use ark_types::version::{ARK_API_VERSION, ARK_VERSION};
use axum::http::StatusCode;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{Header, Ref, RefOr, Required, ResponseBuilder};

use crate::idempotency::KEYLESS;

/// Adds to each operation of the thing or collection at `path` the headers that are understood there, and the replies that they
/// lead to.
pub(super) fn document(path: &str, item: &mut PathItem) {
    let last = path.rsplit('/').next().unwrap_or_default();
    let (is_thing, takes_key) = (last.ends_with('}'), !KEYLESS.contains(&last));
    let is_below_thing = path.contains('}');
    if let Some(get) = item.get.as_mut().filter(|_| is_thing) {
        take(
            get,
            "if-none-match",
            "Tags of what is known already: while it is one of them, the reply is 304",
            None,
        );
        let unchanged = ResponseBuilder::new().description("It is as it was").build();
        get.responses.responses.insert(StatusCode::NOT_MODIFIED.as_str().to_owned(), unchanged.into());
        tell(get, "200", "etag", "Tag of it, for `If-Match` and `If-None-Match`");
    }
    for change in [&mut item.put, &mut item.patch, &mut item.delete, &mut item.post].into_iter().flatten() {
        if is_below_thing {
            take(change, "if-match", "Do it only while the thing has one of these tags; else 412", None);
        }
    }
    if let Some(post) = item.post.as_mut().filter(|_| takes_key) {
        let about =
            "Whoever sends the same request with the same key again, within a day, gets the same reply";
        take(post, IDEMPOTENCY_KEY, about, Some(MAX_KEY));
        tell(post, "2", IDEMPOTENCY_REPLAYED, "`true` when the reply was given before");
    }
    for operation in [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete] {
        let Some(operation) = operation else { continue };
        tell(operation, "", ARK_VERSION, "Version of arkd");
        tell(operation, "", ARK_API_VERSION, "Version of the API: v1");
        let problem = RefOr::Ref(Ref::from_response_name("Problem"));
        operation.responses.responses.insert("default".to_owned(), problem);
    }
}

/// A header that the request may have, of so many characters at most.
fn take(operation: &mut Operation, name: &str, about: &str, most: Option<usize>) {
    let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(most);
    let parameter: Parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(about))
        .schema(Some(text.build()))
        .build();
    operation.parameters.get_or_insert_default().push(RefOr::T(parameter));
}

/// A header that the replies have whose status begins so.
fn tell(operation: &mut Operation, status: &str, name: &str, about: &str) {
    for (code, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && code.starts_with(status)
        {
            let mut header = Header::new(ObjectBuilder::new().schema_type(Type::String).build());
            header.description = Some(about.to_owned());
            response.headers.insert(name.to_owned(), RefOr::T(header));
        }
    }
}
