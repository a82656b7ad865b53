"""FID, CLIP score, CMMD, HPSv2 and the judge, of a folder of images."""
