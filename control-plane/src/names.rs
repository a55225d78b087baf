//! Pleasant names for agents whose creator gave none.

use ark_types::agent::AgentName;

/// First halves.
const MANNERS: [&str; 32] = [
    "able", "amber", "brave", "bright", "calm", "clear", "deft", "eager", "fair", "fleet", "fond", "gentle",
    "glad", "keen", "kind", "light", "lucid", "mellow", "merry", "neat", "noble", "plain", "proud", "quick",
    "quiet", "ready", "sharp", "steady", "sunny", "swift", "warm", "wise",
];
/// Second halves.
const ANIMALS: [&str; 32] = [
    "badger", "beaver", "bison", "crane", "dove", "eagle", "egret", "falcon", "finch", "fox", "gecko",
    "hare", "heron", "ibex", "jay", "koala", "lark", "lemur", "lynx", "marten", "newt", "otter", "owl",
    "panda", "puffin", "raven", "robin", "seal", "stork", "swan", "tern", "wren",
];

/// A name made from `dice`; different dice mostly make different names, so the caller asks again for one that is taken.
///
/// # Panics
/// Never: a test over all words shows that they make names.
#[must_use]
pub fn from_dice(dice: u64) -> AgentName {
    let pick = |words: &[&'static str; 32], shift: u32| words[((dice >> shift) & 31) as usize];
    let text = format!("{}-{}-{:03}", pick(&MANNERS, 0), pick(&ANIMALS, 5), (dice >> 10) % 1000);
    text.parse().expect("words and digits joined by '-' are a label")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn all_words_make_valid_names() {
        for word in 0..32 {
            assert!(!super::from_dice(word | word << 5).as_ref().is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_dice_make_a_valid_name(dice: u64) {
            let name = super::from_dice(dice);
            prop_assert_eq!(name.as_ref().split('-').count(), 3);
        }
    }
}
