//! The OpenAPI document: served, complete and frozen.

use ark_types::problem::Problem;
use serde_json::Value;

use crate::harness::Place;

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/types/schema/openapi.json");

#[test]
fn the_document_is_the_frozen_one() {
    let now = format!("{}\n", arkd::routes::document().to_pretty_json().unwrap());
    if std::env::var_os("ARK_BLESS").is_some() {
        std::fs::create_dir_all(std::path::Path::new(SNAPSHOT).parent().unwrap()).unwrap();
        std::fs::write(SNAPSHOT, &now).unwrap();
    }
    let frozen = std::fs::read_to_string(SNAPSHOT).unwrap_or_default();
    assert!(
        now == frozen,
        "the REST API changed; if that is wanted: ARK_BLESS=1 cargo test -p arkd the_document"
    );
}

#[test]
fn every_operation_has_an_id_a_tag_and_the_problem_reply() {
    let document = serde_json::to_value(arkd::routes::document()).unwrap();
    let mut operations = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations += 1;
            let problem = &operation["responses"]["default"]["$ref"];
            assert_eq!(problem, "#/components/responses/Problem", "{method} {path}");
            assert!(operation["operationId"].is_string() && operation["tags"].is_array(), "{method} {path}");
        }
    }
    assert_eq!(operations, 72);
}

#[test]
fn every_reference_leads_somewhere() {
    fn check(value: &Value, document: &Value) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(reference)) = object.get("$ref") {
                    assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
                }
                object.values().for_each(|value| check(value, document));
            }
            Value::Array(values) => values.iter().for_each(|value| check(value, document)),
            _ => {}
        }
    }
    let document = serde_json::to_value(arkd::routes::document()).unwrap();
    check(&document, &document);
}

#[tokio::test]
async fn the_document_is_served() {
    let place = Place::new();
    let ark = place.start().await;
    let served: Value = ark.client.get("/v1/openapi.json").await.json();
    assert_eq!(served["openapi"], "3.1.0");
    assert!(served["components"]["schemas"][<Problem as utoipa::ToSchema>::name().as_ref()].is_object());
    ark.daemon.shut_down().await;
}
