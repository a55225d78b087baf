//! Guards: while one lives, a snapshot and every base below it stay on disk.

use std::path::Path;
use std::sync::Arc;

use ark_types::image::ImageName;
use ark_types::model::ModelName;
use ark_types::vmm::{SnapshotId, SnapshotManifest};

use super::store::Store;
use super::table::{Link, Proof};
use super::{LABEL_IMAGE, LABEL_IMAGE_DIGEST, LABEL_MODEL, LABEL_MODEL_DIGEST, SnapshotError};
use crate::images::{Image, Images};
use crate::media::Media;
use crate::models::{ModelFile, Models};

/// A snapshot in use; clones are the same use.
#[derive(Clone, Debug)]
pub struct Hold(Arc<Held>);

#[derive(Debug)]
struct Held {
    store: Store,
    id: SnapshotId,
    dir: std::path::PathBuf,
    manifest: Arc<SnapshotManifest>,
    proof: Proof,
    /// Dropped after this one was given back.
    base: Option<Hold>,
}

impl Hold {
    /// Guards of links that were counted already, topmost first; none when there are no links.
    pub(super) fn of(store: &Store, links: Vec<Link>) -> Option<Self> {
        links.into_iter().rev().fold(None, |base, Link { id, dir, manifest, proof }| {
            Some(Self(Arc::new(Held { store: store.clone(), id, dir, manifest, proof, base })))
        })
    }

    /// The snapshot's identity.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.0.id
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// What it says of itself.
    #[must_use]
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.0.manifest
    }

    /// What it is a diff over.
    #[must_use]
    pub fn base(&self) -> Option<&Self> {
        self.0.base.as_ref()
    }

    /// Name and digest of the image that its VM was booted from, as its labels have them.
    #[must_use]
    pub fn image(&self) -> Option<(ImageName, String)> {
        let labels = &self.0.manifest.labels;
        Some((labels.get(LABEL_IMAGE)?.parse().ok()?, labels.get(LABEL_IMAGE_DIGEST)?.clone()))
    }

    /// Name and digest of the model that its VM serves, as its labels have them; none where it serves none.
    #[must_use]
    pub fn model(&self) -> Option<(ModelName, String)> {
        let labels = &self.0.manifest.labels;
        Some((labels.get(LABEL_MODEL)?.parse().ok()?, labels.get(LABEL_MODEL_DIGEST)?.clone()))
    }

    /// The disks that its VM was booted with, proved to be the same still.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub async fn open_media(&self, images: &Images, models: &Models) -> Result<Media, SnapshotError> {
        Ok(Media { image: self.open_image(images).await?, model: self.open_model(images, models).await? })
    }

    async fn open_model(&self, images: &Images, models: &Models) -> Result<Option<ModelFile>, SnapshotError> {
        let Some((name, wanted)) = self.model() else { return Ok(None) };
        let model = models.open_file(images, &name).await?;
        if model.digest != wanted {
            return Err(SnapshotError::OtherModel { model: name, wanted, found: model.digest });
        }
        Ok(Some(model))
    }

    async fn open_image(&self, images: &Images) -> Result<Image, SnapshotError> {
        let Some((name, wanted)) = self.image() else {
            let why = "its manifest does not say which image it is of; take it again".to_owned();
            return Err(SnapshotError::Unusable { dir: self.0.dir.clone(), why });
        };
        let image = images.open(&name).await?;
        if image.manifest.digest != wanted {
            return Err(SnapshotError::OtherImage { image: name, wanted, found: image.manifest.digest });
        }
        Ok(image)
    }

    /// Proves that every byte of it and of its bases is what was written. Costs a look at each file while they do not
    /// change; who asks meanwhile waits for the one proof.
    ///
    /// # Errors
    /// [`SnapshotError::Unusable`] with what is wrong, or why it cannot be told.
    pub async fn prove(&self) -> Result<(), SnapshotError> {
        let mut links = vec![self];
        while let Some(base) = links.last().and_then(|link| link.base()) {
            links.push(base);
        }
        for Self(link) in links.into_iter().rev() {
            super::proof::prove(&link.proof, &link.dir, link.store.vmm()).await?;
        }
        Ok(())
    }

    /// The same use, counted as a living agent.
    #[must_use]
    pub fn tenant(&self) -> Tenant {
        self.0.store.count_tenant(self.0.id, true);
        Tenant(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.store.give_back(self.id);
    }
}

/// A living agent that goes on from a snapshot.
#[derive(Debug)]
pub struct Tenant(Hold);

impl Tenant {
    /// The snapshot.
    #[must_use]
    pub const fn hold(&self) -> &Hold {
        &self.0
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        self.0.0.store.count_tenant(self.0.0.id, false);
    }
}
