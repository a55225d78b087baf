//! `/v1/images`.

use ark_types::image::{ImageList, ImageManifest};
use axum::Json;
use axum::extract::{Path, State};

use super::Shared;
use crate::problems::Refusal;

/// Images agents can be created from.
#[utoipa::path(get, path = "/images", tag = "images", responses((status = OK, body = ImageList, description = "Images")))]
pub(super) async fn list_images(State(core): State<Shared>) -> Result<Json<ImageList>, Refusal> {
    Ok(Json(ImageList { images: core.images.list()? }))
}

/// One image.
#[utoipa::path(
    get, path = "/images/{image}", tag = "images",
    params(("image" = String, Path, description = "Name of the image")),
    responses((status = OK, body = ImageManifest, description = "Its manifest")),
)]
pub(super) async fn inspect_image(
    State(core): State<Shared>,
    Path(image): Path<String>,
) -> Result<Json<ImageManifest>, Refusal> {
    Ok(Json(core.images.manifest(&image)?))
}
