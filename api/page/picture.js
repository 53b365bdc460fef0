/** Pictures: a file becomes a data URL, made smaller where it is larger than models look at. */

const LONGEST = 1280; // pixels of a side
const QUALITY = 0.88;

/** Returns an image file as a data URL of a JPEG. Throws an Error with a sentence. */
export async function pictureOf(file) {
  const image = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "The file"} is not an image that this browser can read.`);
  });
  const scale = Math.min(1, LONGEST / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // shows through where the image is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return canvas.toDataURL("image/jpeg", QUALITY);
}

/** Returns the image files of what was pasted or dropped. */
export const imagesIn = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
