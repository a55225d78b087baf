//! Inference as programs in agents find it: at the command, the Python module and the socket, if they are allowed to.

use ark_tests::World;

/// Asks for the models at the Unix socket for OpenAI's clients; writes the status, and what `detail` says.
const BY_SOCKET: &str = r#"
import http.client, json, socket
class Here(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/ark/openai.sock")
for _ in range(3):
    here = Here("ark")
    here.request("GET", "/v1/models")
    reply = here.getresponse()
    said = json.loads(reply.read())
    here.close()
    print(reply.status, said.get("type"), said.get("detail"))
"#;

/// Has a model say something; writes the exception's name.
const BY_MODULE: &str = r#"
import ark
try:
    print(ark.ai.chat("hello"))
except ark.ai.AIError as error:
    print(type(error).__name__, error)
"#;

/// Asserts that programs of the agent `name`, of image `python`, are refused wherever they ask, each in a sentence.
fn is_refused(world: &World, name: &str) {
    let word = format!("agent {name} may not use inference");
    // Users of the guest are alike to the host.
    for user in ["root", "agent"] {
        let run = |program: &[&str]| {
            world.ark(["exec", "--user", user, name, "--"].into_iter().chain(program.iter().copied()))
        };
        run(&["ark-ai", "chat", "hello"]).exits(1).complains_about(&[&word, "--allow inference"]);
        let by_socket = run(&["python3", "-c", BY_SOCKET]).ok().stdout;
        assert_eq!(by_socket.lines().count(), 3, "{by_socket}");
        assert!(
            by_socket.lines().all(|line| line.starts_with("403 /problems/not-allowed the ")),
            "{by_socket}"
        );
        assert!(by_socket.lines().all(|line| line.contains(&word)), "{by_socket}");
        let by_module = run(&["python3", "-c", BY_MODULE]).ok().stdout;
        assert!(by_module.starts_with("NotAllowed ") && by_module.contains(&word), "{by_module}");
    }
}

#[test]
fn who_is_allowed_nothing_is_refused_at_every_door_forks_included() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "python", "--name", "a1"]).ok();
    is_refused(&world, "a1");
    for fork in world.fork("a1", 1) {
        is_refused(&world, &fork);
    }
    // A static program needs nothing of its image.
    world.create("b1");
    world
        .ark(["exec", "b1", "--", "ark-ai", "models"])
        .exits(1)
        .complains_about(&["b1", "may not use inference"]);
    let _ = world.ark(["create", "--image", "base", "--name", "c1", "--allow", "inference=router"]).ok();
    let allowed = &world.inspect("c1")["allow"];
    assert_eq!(allowed, &serde_json::json!(["inference=router"]));
    world
        .ark(["create", "--image", "base", "--allow", "network"])
        .exits(125)
        .complains_about(&["inference=MODEL"]);
    world.end();
}
