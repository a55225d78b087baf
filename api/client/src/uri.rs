//! Building request paths: everything a user typed is percent-encoded.

use std::fmt::Write as _;

/// Percent-encodes what is not unreserved in RFC 3986, section 2.3; `/` stays when `keep_slash`.
fn encode(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'.' | b'_' | b'~')
            || (keep_slash && byte == b'/');
        if plain {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// `/v1/agents/<agent><rest>`.
pub(crate) fn agent(agent: &str, rest: &str) -> String {
    format!("/v1/agents/{}{rest}", encode(agent, false))
}

/// `path` with those of `parameters` that have a value.
pub(crate) fn query(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let given = parameters.iter().filter_map(|(name, value)| Some((name, (*value)?)));
    let given: Vec<String> = given.map(|(name, value)| format!("{name}={}", encode(value, true))).collect();
    if given.is_empty() { path.to_owned() } else { format!("{path}?{}", given.join("&")) }
}

/// `/v1/images/<image>`.
pub(crate) fn image(image: &str) -> String {
    format!("/v1/images/{}", encode(image, false))
}

/// `/v1/snapshots/<snapshot><rest>`.
pub(crate) fn snapshot(snapshot: &str, rest: &str) -> String {
    format!("/v1/snapshots/{}{rest}", encode(snapshot, false))
}

/// `/v1/models/<model><rest>`.
pub(crate) fn model(model: &str, rest: &str) -> String {
    format!("/v1/models/{}{rest}", encode(model, false))
}

/// `/v1/templates/<template>`.
pub(crate) fn template(template: &str) -> String {
    format!("/v1/templates/{}", encode(template, false))
}

/// `/v1/pools/<template>`.
pub(crate) fn pool(template: &str) -> String {
    format!("/v1/pools/{}", encode(template, false))
}

/// `/v1/owners/<owner>`.
pub(crate) fn owner(owner: &str) -> String {
    format!("/v1/owners/{}", encode(owner, false))
}

/// `/v1/services/<service><rest>`.
pub(crate) fn service(service: &str, rest: &str) -> String {
    format!("/v1/services/{}{rest}", encode(service, false))
}

/// `/v1/tasks/<task><rest>`.
pub(crate) fn task(task: &str, rest: &str) -> String {
    format!("/v1/tasks/{}{rest}", encode(task, false))
}

/// `/v1/agents/<agent>/files<rest>?path=<path>`.
pub(crate) fn files(name: &str, rest: &str, path: &str) -> String {
    format!("{}?path={}", agent(name, &format!("/files{rest}")), encode(path, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_type_cannot_leave_its_segment_or_its_parameter() {
        assert_eq!(agent("a1", "/exec"), "/v1/agents/a1/exec");
        assert_eq!(agent("../x?y", ""), "/v1/agents/..%2Fx%3Fy");
        assert_eq!(snapshot("s/..", "?orphans=true"), "/v1/snapshots/s%2F..?orphans=true");
        assert_eq!(template("a?b"), "/v1/templates/a%3Fb");
        assert_eq!(pool("a/b"), "/v1/pools/a%2Fb");
        assert_eq!(owner("a/b"), "/v1/owners/a%2Fb");
        assert_eq!(service("a/b", "/call"), "/v1/services/a%2Fb/call");
        assert_eq!(task("a/b", "/logs"), "/v1/tasks/a%2Fb/logs");
        assert_eq!(image("a b"), "/v1/images/a%20b");
        assert_eq!(query("/v1/x", &[("a", None), ("b", None)]), "/v1/x");
        assert_eq!(
            query("/v1/x", &[("a", Some("p&q=r")), ("b", None), ("c", Some("s/t"))]),
            "/v1/x?a=p%26q%3Dr&c=s/t"
        );
        assert_eq!(
            files("a", "/stat", "/tmp/ü&mode=7#%"),
            "/v1/agents/a/files/stat?path=/tmp/%C3%BC%26mode%3D7%23%25"
        );
    }
}
