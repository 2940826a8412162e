"""What there is to train on, and which LightningModule fits it, by name. Imports no torch, so that listing is instant.

Every data module has ``vocab_size`` and the class attribute ``model``, a key of :data:`MODELS`. A batch is a dict:

=============  ==================  =======================================================
``tokens``     (B, T) int64        ids in 0..vocab_size-1
``targets``    (B, T) int64        what to answer at each position, -100 where nothing is asked (language models)
``label``      (B,) int64          the class (classifiers)
``cu_seqlens`` (N+1,) int32        optional: bounds of the packed documents of a single row, B = 1
``padding_mask``  (B, T) bool      optional: True at real tokens
=============  ==================  =======================================================
"""

DATA = {
    "text": "lit_modules.data.text:TextData",
    "mqar": "lit_modules.data.mqar:MQARData",
    "classification": "lit_modules.data.classification:ClassificationData",
}

MODELS = {
    "language_model": "lit_modules.language_model:LanguageModel",
    "sequence_classifier": "lit_modules.sequence_classifier:SequenceClassifier",
}
