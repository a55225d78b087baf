//! What an agent's VM reads from: its disks in their order, and how a snapshot of it names them.

use std::path::PathBuf;

use crate::images::Image;
use crate::models::ModelFile;
use crate::snapshots::{LABEL_IMAGE, LABEL_IMAGE_DIGEST, LABEL_MODEL, LABEL_MODEL_DIGEST};

/// The image that a VM boots, and the model of one that serves one.
#[derive(Clone, Debug)]
pub struct Media {
    /// `/dev/vda` of the guest.
    pub image: Image,
    /// `/dev/vdb`.
    pub model: Option<ModelFile>,
}

impl From<Image> for Media {
    fn from(image: Image) -> Self {
        Self { image, model: None }
    }
}

impl Media {
    /// The disks' files; the guest may not write to any.
    pub fn disks(&self) -> impl Iterator<Item = PathBuf> + '_ {
        std::iter::once(&self.image.path).chain(self.model.as_ref().map(|model| &model.path)).cloned()
    }

    /// What the VM and its snapshots are labelled with, so that whoever goes on from one finds the same disks.
    pub fn labels(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let manifest = &self.image.manifest;
        let image = [(LABEL_IMAGE, manifest.name.to_string()), (LABEL_IMAGE_DIGEST, manifest.digest.clone())];
        let model = self.model.iter().flat_map(|model| {
            [(LABEL_MODEL, model.name.to_string()), (LABEL_MODEL_DIGEST, model.digest.clone())]
        });
        image.into_iter().chain(model).map(|(key, value)| (key.to_owned(), value))
    }
}
