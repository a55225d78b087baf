//! Which `arkd` answers, and which API it speaks: in the head of every reply.

use ark_types::problem::ProblemKind;
use ark_types::version::{API_VERSION, ARK_API_VERSION, ARK_VERSION};
use axum::Router;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};

use crate::problems::Refusal;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `routes`, every reply of which tells the versions. A request for another API is refused. Put it outside of everything that
/// answers by itself.
pub fn told(routes: Router) -> Router {
    routes.layer(from_fn(tell))
}

async fn tell(request: Request, next: Next) -> Response {
    let is_served = |value: &HeaderValue| value == API_VERSION;
    let mut response = match request.headers().get(ARK_API_VERSION) {
        Some(wanted) if !is_served(wanted) => {
            let detail = format!(
                "{ARK_API_VERSION} {wanted:?} is not served here: this arkd {VERSION} serves {API_VERSION}; leave the header out, or use a client of this release"
            );
            Refusal::new(ProblemKind::BadRequest, detail).into_response()
        }
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(ARK_VERSION, HeaderValue::from_static(VERSION));
    headers.insert(ARK_API_VERSION, HeaderValue::from_static(API_VERSION));
    response
}
