//! `ark images`.

use ark_types::image::ImageList;

use crate::failure::Failure;
use crate::host::Context;
use crate::output::{printable, size, table};

/// Hexadecimal digits of a digest that a table shows.
const SHORT_DIGEST: usize = 12;

/// Lists the images agents can boot.
pub(crate) async fn images(context: &Context) -> Result<(), Failure> {
    let list = context.client().await?.images().await?;
    if list.images.is_empty() {
        context.ui.note("there is no image yet: `make` builds them");
    }
    context.ui.show(&list, image_table)
}

fn image_table(list: &ImageList) -> String {
    let rows: Vec<_> = list
        .images
        .iter()
        .map(|image| {
            let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
            [
                image.name.to_string(),
                digest.chars().take(SHORT_DIGEST).collect(),
                size(image.size),
                printable(&image.description),
            ]
        })
        .collect();
    table(["NAME", "DIGEST", "SIZE", "DESCRIPTION"], &rows)
}
