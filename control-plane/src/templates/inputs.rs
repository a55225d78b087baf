//! What a template is built of, and the digest over it.

use ark_types::template::CreateTemplate;
use sha2::{Digest as _, Sha256};

use super::TemplateError;
use crate::core::Core;
use crate::media::Media;
use crate::models::ModelFile;

/// Layout of what is hashed. Another one makes every template another.
const LAYOUT: &str = "ark template 1";

/// Everything that a template depends on.
#[derive(Clone, Debug)]
pub(super) struct Inputs {
    pub(super) media: Media,
    /// `sha256:` and 64 hexadecimal digits.
    pub(super) digest: String,
}

impl Inputs {
    /// As the files are now.
    pub(super) async fn of(core: &Core, request: &CreateTemplate) -> Result<Self, TemplateError> {
        let image = core.images.open(&request.image).await?;
        let kernel = core.images.digest_of(&core.config.assets.kernel()).await?;
        let initrd = core.images.digest_of(&core.config.assets.initrd()).await?;
        let model = match &request.model {
            Some(name) => Some(core.models.open_file(&core.images, name).await?),
            None => None,
        };
        let digest = digest((&kernel, &initrd), &image.manifest.digest, model.as_ref(), request);
        Ok(Self { media: Media { image, model }, digest })
    }

    /// The digest's hexadecimal digits.
    pub(super) fn digits(&self) -> &str {
        self.digest.strip_prefix("sha256:").unwrap_or(&self.digest)
    }
}

/// The digest over everything; the warm-up comes last, since it alone has no bounded form.
pub(super) fn digest(
    (kernel, initrd): (&str, &str),
    image: &str,
    model: Option<&ModelFile>,
    request: &CreateTemplate,
) -> String {
    let CreateTemplate { vcpus, memory_mib, warm, .. } = request;
    let is_warm = u8::from(warm.is_some());
    let head = format!("{LAYOUT}\n{kernel}\n{initrd}\n{image}\n{vcpus}\n{memory_mib}\n{is_warm}\n");
    let mut hasher = Sha256::new();
    hasher.update(head);
    if let Some(ModelFile { name, digest, context, .. }) = model {
        // The server knows it by its name.
        hasher.update(format!("{name}\n{digest}\n{context}\n"));
    }
    hasher.update(warm.as_deref().unwrap_or_default());
    let digits: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}
